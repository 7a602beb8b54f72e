/* Attention of short documents, each computed by itself from beginning to end in the cache.

   A document with one key head and the query heads that share it is one task, and tasks are what
   threads share. All is float32 inside; what is read and written is ELEMENT. Queries go in blocks, so
   that keys behind a block are not computed. kernels.c includes this file, first for what does not
   depend on the element, then once for each; short_attention.py calls it and names the arguments. */

#ifndef ATTENTION_TILES
#define ATTENTION_TILES

#include <stddef.h>

#define LANES 16
#ifdef __AVX512F__
#define TILE_ROWS 4
#define TILE_VECTORS 4
#else
#define TILE_ROWS 2
#define TILE_VECTORS 2
#endif
#define BLOCK 16

/* Sixteen numbers; a compiler splits them over the registers that there are. */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ROUND_UP(n) (((n) + LANES - 1) / LANES * LANES)

/* c (+)= a b for a few rows of c and a few vectors of columns, all sums in registers. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const int vectors, const float *a, int64_t a_row, int64_t a_column,
    const float *b, int64_t b_row, float *c, int64_t c_row, int64_t depth, int add) {
    lanes sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            lanes zero = {0};
            sums[i][v] = add ? *(const lanes *)(c + i * c_row + v * LANES) : zero;
        }
    for (int64_t k = 0; k < depth; k++) {
        const float *line = b + k * b_row, *factors = a + k * a_column;
        lanes values[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            values[v] = *(const lanes *)(line + v * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            float factor = factors[i * a_row];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[i][v] += factor * values[v];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            *(lanes *)(c + i * c_row + v * LANES) = sums[i][v];
}

#define TILE(rows, vectors)                                                                        \
    tile(rows, vectors, a + i * a_row, a_row, a_column, b + n, b_row, c + i * c_row + n, c_row, depth, add)

/* c[i][n] (+)= sum of a[i][k] b[k][n] over k < depth, for i < rows and n < width, a multiple of 16. Element
   (i, k) of a is at i a_row + k a_column; b and c lie row by row. */
static void multiply(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                     float *c, int64_t c_row, int64_t rows, int64_t depth, int64_t width, int add) {
    for (int64_t n = 0; n < width; n += TILE_VECTORS * LANES) {
        int64_t vectors = (width - n) / LANES, i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            switch (vectors) {
            case 1: TILE(TILE_ROWS, 1); break;
#if TILE_VECTORS > 2
            case 2: TILE(TILE_ROWS, 2); break;
            case 3: TILE(TILE_ROWS, 3); break;
#endif
            default: TILE(TILE_ROWS, TILE_VECTORS);
            }
        for (; i < rows; i++)
            switch (vectors) {
            case 1: TILE(1, 1); break;
#if TILE_VECTORS > 2
            case 2: TILE(1, 2); break;
            case 3: TILE(1, 3); break;
#endif
            default: TILE(1, TILE_VECTORS);
            }
    }
}

/* Where the keys of a document are: key j is token j of a shared beginning, or one of its own. */
typedef struct {
    int64_t start, own, prefix, keys, padded;
} document;

static inline document document_at(const int64_t *documents, int64_t number) {
    const int64_t *found = documents + 3 * number;
    int64_t keys = found[1] + found[2];
    document d = {found[0], found[1], found[2], keys, ROUND_UP(keys)};
    return d;
}

static inline int64_t token_of(const document *d, int64_t key) {
    return key < d->prefix ? key : d->start + key - d->prefix;
}

/* Scores [0, seen) of the query at `last` become minus infinity where it does not see the key. */
static inline void hide(float *line, int64_t last, int64_t seen, int64_t window) {
    for (int64_t j = 0; j < last + 1 - window; j++)
        line[j] = -INFINITY;
    for (int64_t j = last + 1; j < seen; j++)
        line[j] = -INFINITY;
}

#endif

#ifdef ELEMENT

/* Rows [keys, width] of one head of x [tokens, heads, width], zeros behind them up to `padded`. */
static void NAME(read_rows)(const ELEMENT *x, const document *d, int64_t first, int64_t count,
                            int64_t padded, int64_t head, int64_t heads, int64_t width, float factor,
                            float *rows) {
    for (int64_t j = 0; j < count; j++) {
        const ELEMENT *in = x + (token_of(d, first + j) * heads + head) * width;
        float *out = rows + j * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            out[i] = LOAD(in[i]) * factor;
    }
    memset(rows + count * width, 0, (padded - count) * width * sizeof(float));
}

static void NAME(write_row)(const float *row, ELEMENT *out, float factor, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
        out[i] = STORE(row[i] * factor);
}

/* columns [width, padded] from rows [padded, width]. */
static void NAME(turn)(const float *restrict rows, float *restrict columns, int64_t padded, int64_t width) {
    for (int64_t start = 0; start < padded; start += LANES)
        for (int64_t i = 0; i < width; i++)
            for (int64_t j = start; j < start + LANES; j++)
                columns[i * padded + j] = rows[j * width + i];
}

/* out = softmax(scale q k) v over what each query sees; log_sums [tokens, heads] is kept for the gradient.
   `work` has `room` numbers for each thread. */
void NAME(attention)(const ELEMENT *q, const ELEMENT *k, const ELEMENT *v, const int64_t *documents,
                     ELEMENT *out, float *log_sums, float *work, int64_t room, float scale,
                     int64_t count, int64_t heads, int64_t key_heads, int64_t width, int64_t window,
                     int64_t threads) {
    int64_t group = heads / key_heads;
#pragma omp parallel num_threads((int)threads)
    {
        float *mine = work + THREAD * room;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * key_heads; task++) {
            document d = document_at(documents, task / key_heads);
            int64_t key_head = task % key_heads;
            float *columns = mine, *values = columns + d.padded * width;
            float *queries = values + d.padded * width, *scores = queries + BLOCK * width;
            float *results = scores + BLOCK * d.padded;
            NAME(read_rows)(k, &d, 0, d.keys, d.padded, key_head, key_heads, width, 1.0f, values);
            NAME(turn)(values, columns, d.padded, width);
            NAME(read_rows)(v, &d, 0, d.keys, d.padded, key_head, key_heads, width, 1.0f, values);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
                for (int64_t start = 0; start < d.own; start += BLOCK) {
                    int64_t rows = d.own - start < BLOCK ? d.own - start : BLOCK;
                    int64_t seen = ROUND_UP(d.prefix + start + rows);
                    NAME(read_rows)(q, &d, d.prefix + start, rows, rows, head, heads, width, scale, queries);
                    multiply(queries, width, 1, columns, d.padded, scores, d.padded, rows, width, seen, 0);
                    for (int64_t row = 0; row < rows; row++) {
                        float *line = scores + row * d.padded, highest = -INFINITY, sum = 0.0f;
                        int64_t last = d.prefix + start + row;
                        hide(line, last, seen, window);
#pragma omp simd reduction(max : highest)
                        for (int64_t j = 0; j < seen; j++)
                            highest = line[j] > highest ? line[j] : highest;
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = 0; j < seen; j++) {
                            line[j] = exponential(line[j] - highest);
                            sum += line[j];
                        }
                        float inverse = 1.0f / sum;
#pragma omp simd
                        for (int64_t j = 0; j < seen; j++)
                            line[j] *= inverse;
                        log_sums[token_of(&d, last) * heads + head] = highest + logf(sum);
                    }
                    multiply(scores, d.padded, 1, values, width, results, width, rows, seen, width, 0);
                    for (int64_t row = 0; row < rows; row++) {
                        int64_t token = token_of(&d, d.prefix + start + row);
                        NAME(write_row)(results + row * width, out + (token * heads + head) * width, 1.0f, width);
                    }
                }
        }
    }
}

/* The gradients of q, k and v from `grad`, that of out. What a shared beginning gets from each document lies in
   of_prefix [2, count, key_heads, prefix, width], k's before v's, and is added up in the end. */
void NAME(attention_backward)(const ELEMENT *grad, const ELEMENT *q, const ELEMENT *k, const ELEMENT *v,
                              const float *log_sums, const int64_t *documents, ELEMENT *dq, ELEMENT *dk,
                              ELEMENT *dv, float *of_prefix, float *work, int64_t room, float scale,
                              int64_t count, int64_t heads, int64_t key_heads, int64_t width,
                              int64_t window, int64_t prefix, int64_t threads) {
    int64_t group = heads / key_heads, part = count * key_heads * prefix * width;
#pragma omp parallel num_threads((int)threads)
    {
        float *mine = work + THREAD * room;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * key_heads; task++) {
            document d = document_at(documents, task / key_heads);
            int64_t key_head = task % key_heads, whole = d.padded * width, own = ROUND_UP(d.own);
            float *keys = mine, *key_columns = keys + whole, *value_columns = key_columns + whole;
            float *dkeys = value_columns + whole, *dvalues = dkeys + whole, *queries = dvalues + whole;
            float *grads = queries + own * width, *dqueries = grads + own * width;
            float *shares = dqueries + BLOCK * width, *dscores = shares + own * d.padded;
            NAME(read_rows)(v, &d, 0, d.keys, d.padded, key_head, key_heads, width, 1.0f, keys);
            NAME(turn)(keys, value_columns, d.padded, width);
            NAME(read_rows)(k, &d, 0, d.keys, d.padded, key_head, key_heads, width, 1.0f, keys);
            NAME(turn)(keys, key_columns, d.padded, width);
            memset(dkeys, 0, whole * sizeof(float));
            memset(dvalues, 0, whole * sizeof(float));
            for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
                NAME(read_rows)(q, &d, d.prefix, d.own, own, head, heads, width, scale, queries);
                NAME(read_rows)(grad, &d, d.prefix, d.own, own, head, heads, width, 1.0f, grads);
                for (int64_t start = 0; start < d.own; start += BLOCK) {
                    int64_t rows = d.own - start < BLOCK ? d.own - start : BLOCK;
                    int64_t seen = ROUND_UP(d.prefix + start + rows);
                    float *share = shares + start * d.padded, *dscore = dscores + start * d.padded;
                    multiply(queries + start * width, width, 1, key_columns, d.padded, share, d.padded, rows,
                             width, seen, 0);
                    multiply(grads + start * width, width, 1, value_columns, d.padded, dscore, d.padded, rows,
                             width, seen, 0);
                    for (int64_t row = 0; row < rows; row++) {
                        float *p = share + row * d.padded, *ds = dscore + row * d.padded, dot = 0.0f;
                        int64_t last = d.prefix + start + row;
                        float log_sum = log_sums[token_of(&d, last) * heads + head];
                        hide(p, last, seen, window);
#pragma omp simd reduction(+ : dot)
                        for (int64_t j = 0; j < seen; j++) {
                            p[j] = exponential(p[j] - log_sum);
                            dot += p[j] * ds[j];
                        }
#pragma omp simd
                        for (int64_t j = 0; j < seen; j++)
                            ds[j] = p[j] * (ds[j] - dot);
                    }
                    multiply(dscore, d.padded, 1, keys, width, dqueries, width, rows, seen, width, 0);
                    for (int64_t row = 0; row < rows; row++) {
                        int64_t token = token_of(&d, d.prefix + start + row);
                        NAME(write_row)(dqueries + row * width, dq + (token * heads + head) * width, scale, width);
                    }
                }
                for (int64_t key = 0; key < d.keys; key += BLOCK) {
                    int64_t rows = d.keys - key < BLOCK ? d.keys - key : BLOCK;
                    int64_t from = key > d.prefix ? key - d.prefix : 0, behind = d.own - from;
                    if (behind <= 0)
                        continue;
                    multiply(shares + from * d.padded + key, 1, d.padded, grads + from * width, width,
                             dvalues + key * width, width, rows, behind, width, 1);
                    multiply(dscores + from * d.padded + key, 1, d.padded, queries + from * width, width,
                             dkeys + key * width, width, rows, behind, width, 1);
                }
            }
            float *shared = of_prefix + task * prefix * width;
            for (int64_t key = 0; key < d.keys; key++) {
                int64_t at = (token_of(&d, key) * key_heads + key_head) * width;
                if (key < d.prefix) {
                    memcpy(shared + key * width, dkeys + key * width, width * sizeof(float));
                    memcpy(shared + part + key * width, dvalues + key * width, width * sizeof(float));
                } else {
                    NAME(write_row)(dkeys + key * width, dk + at, 1.0f, width);
                    NAME(write_row)(dvalues + key * width, dv + at, 1.0f, width);
                }
            }
        }
#pragma omp for
        for (int64_t row = 0; row < key_heads * prefix; row++) {
            int64_t key_head = row / prefix, at = (row % prefix * key_heads + key_head) * width;
            for (int64_t i = 0; i < width; i++) {
                float of_k = LOAD(dk[at + i]), of_v = LOAD(dv[at + i]);
                for (int64_t number = 1; number < count; number++) {
                    const float *from = of_prefix + (number * key_heads * prefix + row) * width + i;
                    of_k += from[0];
                    of_v += from[part];
                }
                dk[at + i] = STORE(of_k);
                dv[at + i] = STORE(of_v);
            }
        }
    }
}

#endif
