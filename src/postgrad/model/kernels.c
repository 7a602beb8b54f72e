/* What a training step computes element by element, each in one pass over memory.

   A CPU multiplies matrices so fast that norms, activations, rotary embeddings and the softmax of the
   loss, made of many small tensor operations, take as long as the products. Here each reads its
   inputs once and writes its result once; sums are made in float32, in an order that does not depend
   on the number of threads. Forward passes round where Transformers' layers round (ROUND), so that
   training computes what serving will compute. kernels.py compiles this file; fused.py holds the
   definitions that it is tested against.

   Every function exists twice, for float32 (_f32) and bfloat16 (_bf16): this file includes itself with
   another element type. Rows are independent; rows are what threads share. */

#ifndef ELEMENT

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, SUFFIX)
#define ROUND(x) LOAD(STORE(x))
#define ROWS _Pragma("omp parallel for schedule(static)")

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float load_f32(float x) { return x; }
static inline float store_f32(float x) { return x; }
static inline float load_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

/* Round to the nearest bfloat16, ties to even. A NaN stays one: those that arise here or come from a
   bfloat16 have zeros in their lower half, so that nothing carries into the exponent. */
static inline uint16_t store_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* e^x to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes expf). Below
   -87 it is 0 and NaN stays NaN. Without branches, so that a loop over it becomes vector code. */
static inline float exponential(float x) {
    float clipped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = (clipped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float power = bits_to_float((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

#include "attention.c"

#define ELEMENT float
#define SUFFIX f32
#define LOAD load_f32
#define STORE store_f32
#include "kernels.c"
#undef ELEMENT
#undef SUFFIX
#undef LOAD
#undef STORE
#define ELEMENT uint16_t
#define SUFFIX bf16
#define LOAD load_bf16
#define STORE store_bf16
#include "kernels.c"

#else

/* y = x / sqrt(mean(x^2) + eps) * w for every row; keeps 1 / sqrt(...) in `scale`. */
void NAME(rms_norm)(const ELEMENT *restrict x, const ELEMENT *restrict w, ELEMENT *restrict y,
                    float *restrict scale, float eps, int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *in = x + row * width;
        ELEMENT *out = y + row * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) {
            float value = LOAD(in[i]);
            squares += value * value;
        }
        float inverse = 1.0f / sqrtf(squares / (float)width + eps);
        scale[row] = inverse;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            out[i] = STORE(ROUND(LOAD(in[i]) * inverse) * LOAD(w[i]));
    }
}

/* dx = scale (g - n mean(g n)) with g = dy w and n = x scale. `dw`, where wanted, is [blocks, width]: block
   b sums dy n over rows b * rows_per_block and on. */
void NAME(rms_norm_backward)(const ELEMENT *restrict dy, const ELEMENT *restrict x,
                             const ELEMENT *restrict w, const float *restrict scale,
                             ELEMENT *restrict dx, float *restrict dw, int64_t rows, int64_t width,
                             int64_t rows_per_block) {
    int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
    ROWS
    for (int64_t block = 0; block < blocks; block++) {
        int64_t end = (block + 1) * rows_per_block;
        for (int64_t row = block * rows_per_block; row < (end < rows ? end : rows); row++) {
            const ELEMENT *in = x + row * width, *grad = dy + row * width;
            ELEMENT *out = dx + row * width;
            float inverse = scale[row], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++)
                dot += LOAD(grad[i]) * LOAD(w[i]) * LOAD(in[i]);
            float mean = dot * inverse / (float)width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                out[i] = STORE(inverse * (LOAD(grad[i]) * LOAD(w[i]) - LOAD(in[i]) * inverse * mean));
            if (dw) {
                float *sum = dw + block * width;
#pragma omp simd
                for (int64_t i = 0; i < width; i++)
                    sum[i] += LOAD(grad[i]) * LOAD(in[i]) * inverse;
            }
        }
    }
}

/* y = silu(gate) * up, silu(g) = g / (1 + e^-g). */
void NAME(swiglu)(const ELEMENT *restrict gate, const ELEMENT *restrict up, ELEMENT *restrict y,
                  int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *g = gate + row * width, *u = up + row * width;
        ELEMENT *out = y + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float value = LOAD(g[i]);
            out[i] = STORE(ROUND(value / (1.0f + exponential(-value))) * LOAD(u[i]));
        }
    }
}

/* dgate = dy up s (1 + g (1 - s)) and dup = dy g s with s = 1 / (1 + e^-g); may write over dy. */
void NAME(swiglu_backward)(const ELEMENT *dy, const ELEMENT *gate, const ELEMENT *up, ELEMENT *dgate,
                           ELEMENT *dup, int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *d = dy + row * width, *g = gate + row * width, *u = up + row * width;
        ELEMENT *dg = dgate + row * width, *du = dup + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float grad = LOAD(d[i]), value = LOAD(g[i]);
            float s = 1.0f / (1.0f + exponential(-value));
            dg[i] = STORE(grad * LOAD(u[i]) * s * (1.0f + value * (1.0f - s)));
            du[i] = STORE(grad * value * s);
        }
    }
}

/* Rotary embedding, halves convention: y1 = x1 cos1 - x2 sin1 and y2 = x2 cos2 + x1 sin2, for x, y [rows,
   heads, width] and cos, sin [rows, width]. `sign` -1 turns back: the gradient, where cos and sin
   repeat their halves. */
void NAME(rotary)(const ELEMENT *restrict x, const ELEMENT *restrict cos, const ELEMENT *restrict sin,
                  ELEMENT *restrict y, float sign, int64_t rows, int64_t heads, int64_t width) {
    int64_t half = width / 2;
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *c = cos + row * width, *s = sin + row * width;
        for (int64_t head = 0; head < heads; head++) {
            const ELEMENT *in = x + (row * heads + head) * width;
            ELEMENT *out = y + (row * heads + head) * width;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = LOAD(in[i]), second = LOAD(in[i + half]);
                float up = sign * ROUND(second * LOAD(s[i]));
                float down = sign * ROUND(first * LOAD(s[i + half]));
                out[i] = STORE(ROUND(first * LOAD(c[i])) - up);
                out[i + half] = STORE(ROUND(second * LOAD(c[i + half])) + down);
            }
        }
    }
}

/* loss = log(sum(e^logits)) - logits[label] for every row; then, where `gradient`, the row becomes weight *
   (softmax(logits) - onehot(label)). */
void NAME(cross_entropy)(ELEMENT *restrict logits, const int64_t *restrict labels,
                         const float *restrict weights, float *restrict losses, int64_t gradient,
                         int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        ELEMENT *line = logits + row * width;
        float highest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < width; i++) {
            float value = LOAD(line[i]);
            highest = value > highest ? value : highest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++)
            sum += exponential(LOAD(line[i]) - highest);
        float log_sum = highest + logf(sum), weight = weights[row];
        float of_label = LOAD(line[labels[row]]);
        losses[row] = log_sum - of_label;
        if (!gradient)
            continue;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            line[i] = STORE(weight * exponential(LOAD(line[i]) - log_sum));
        line[labels[row]] = STORE(weight * (expf(of_label - log_sum) - 1.0f));
    }
}

/* log(sum(e^logits)) of every row, and the first place of its highest value. */
void NAME(log_sum_exp)(const ELEMENT *restrict logits, float *restrict sums, int64_t *restrict best,
                       int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *line = logits + row * width;
        float highest = -INFINITY, sum = 0.0f;
        int64_t place = 0;
        for (int64_t start = 0; start < width; start += 1024) {
            int64_t end = start + 1024 < width ? start + 1024 : width;
            float top = -INFINITY;
#pragma omp simd reduction(max : top)
            for (int64_t i = start; i < end; i++) {
                float value = LOAD(line[i]);
                top = value > top ? value : top;
            }
            place = top > highest ? start : place;
            highest = top > highest ? top : highest;
        }
        while (place + 1 < width && LOAD(line[place]) != highest)
            place++;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++)
            sum += exponential(LOAD(line[i]) - highest);
        sums[row] = highest + logf(sum);
        best[row] = place;
    }
}

/* Softmax of scores[row, first .. last] times `factor`, zeros elsewhere; last = row % length (the causal
   mask of queries stacked `length` by `length`), first = last - window + 1, not below 0. Scores [rows,
   length] become probabilities; the factor is positive and the length at most a few thousand (one row of
   float32 lies on the stack). */
void NAME(causal_softmax)(ELEMENT *restrict scores, float factor, int64_t rows, int64_t length,
                          int64_t window) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        ELEMENT *line = scores + row * length;
        int64_t count = row % length + 1, behind = length - count;
        if (count > window) {
            memset(line, 0, (count - window) * sizeof(ELEMENT));
            line += count - window;
            count = window;
        }
        float highest = -INFINITY, sum = 0.0f, powers[length];
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < count; i++) {
            float value = LOAD(line[i]);
            highest = value > highest ? value : highest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) {
            powers[i] = exponential(factor * (LOAD(line[i]) - highest));
            sum += powers[i];
        }
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            line[i] = STORE(powers[i] * inverse);
        memset(line + count, 0, behind * sizeof(ELEMENT));
    }
}

/* dscores = factor p (dp - sum(dp p)), written over dp; zeros where causal_softmax has them. */
void NAME(causal_softmax_backward)(ELEMENT *restrict dp, const ELEMENT *restrict p, float factor,
                                   int64_t rows, int64_t length, int64_t window) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        ELEMENT *line = dp + row * length;
        const ELEMENT *share = p + row * length;
        int64_t count = row % length + 1, behind = length - count;
        if (count > window) {
            memset(line, 0, (count - window) * sizeof(ELEMENT));
            line += count - window;
            share += count - window;
            count = window;
        }
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < count; i++)
            dot += LOAD(line[i]) * LOAD(share[i]);
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            line[i] = STORE(factor * LOAD(share[i]) * (LOAD(line[i]) - dot));
        memset(line + count, 0, behind * sizeof(ELEMENT));
    }
}

/* Softmax of scores[row] times `factor` plus bias, in place. A tree has `rows_per_tree` rows of prefix + length
   scores; row r asks as token i = r % length of tree t, sees the whole prefix and, of its own tree, what
   bias[t, i] (0 or minus infinity, [trees, length, length]) leaves it up to itself; zeros elsewhere. */
void NAME(tree_softmax)(ELEMENT *restrict scores, const ELEMENT *restrict bias, float factor,
                        int64_t rows, int64_t rows_per_tree, int64_t prefix, int64_t length) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        int64_t query = row % length, count = prefix + query + 1;
        const ELEMENT *seen = bias + ((row / rows_per_tree) * length + query) * length;
        ELEMENT *line = scores + row * (prefix + length);
        float highest = -INFINITY, sum = 0.0f, powers[prefix + length];
        for (int64_t i = 0; i < prefix; i++)
            powers[i] = LOAD(line[i]) * factor;
#pragma omp simd
        for (int64_t i = prefix; i < count; i++)
            powers[i] = LOAD(line[i]) * factor + LOAD(seen[i - prefix]);
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < count; i++)
            highest = powers[i] > highest ? powers[i] : highest;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) {
            powers[i] = exponential(powers[i] - highest);
            sum += powers[i];
        }
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            line[i] = STORE(powers[i] * inverse);
        memset(line + count, 0, (prefix + length - count) * sizeof(ELEMENT));
    }
}

/* Rows in 8 bits: x[i] columns[i] is about scales[row] y[i] with whole y[i] from -127 to 127; without `columns`
   they count as ones. A row that is not finite gets scale NaN. */
void NAME(quantise)(const ELEMENT *restrict x, const float *restrict columns, int8_t *restrict y,
                    float *restrict scales, int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const ELEMENT *in = x + row * width;
        int8_t *out = y + row * width;
        uint32_t highest = 0;
        float values[width];
        if (columns) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                values[i] = LOAD(in[i]) * columns[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                values[i] = LOAD(in[i]);
        }
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < width; i++) {
            uint32_t bits = float_to_bits(values[i]) & 0x7fffffffu;
            highest = bits > highest ? bits : highest;
        }
        float largest = bits_to_float(highest);
        int finite = highest < 0x7f800000u;
        float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        scales[row] = finite ? (inverse > 0.0f ? largest / 127.0f : 0.0f) : NAN;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            out[i] = (int8_t)(int32_t)rintf(values[i] * inverse);
    }
}

/* y = sums scales[row] columns[i] + bias[i]; columns and bias may be missing. */
void NAME(dequantise)(const int32_t *restrict sums, const float *restrict scales,
                      const float *restrict columns, const ELEMENT *restrict bias,
                      ELEMENT *restrict y, int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++) {
        const int32_t *in = sums + row * width;
        ELEMENT *out = y + row * width;
        float scale = scales[row];
        if (columns) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                out[i] = STORE((float)in[i] * (scale * columns[i]) + (bias ? LOAD(bias[i]) : 0.0f));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                out[i] = STORE((float)in[i] * scale + (bias ? LOAD(bias[i]) : 0.0f));
        }
    }
}

/* out[i] = x[index[i]], rows of `width` elements. */
void NAME(gather)(const ELEMENT *restrict x, const int64_t *restrict index, ELEMENT *restrict out,
                  int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++)
        memcpy(out + row * width, x + index[row] * width, width * sizeof(ELEMENT));
}

/* out[index[i]] = x[i]; several rows may name the padding row, which nothing reads. */
void NAME(scatter)(const ELEMENT *restrict x, const int64_t *restrict index, ELEMENT *restrict out,
                   int64_t rows, int64_t width) {
    ROWS
    for (int64_t row = 0; row < rows; row++)
        memcpy(out + index[row] * width, x + row * width, width * sizeof(ELEMENT));
}

#include "attention.c"

#endif
