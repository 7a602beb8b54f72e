"""Micro-batches replayed as graphs: the same losses and weights as operation by operation.

CUDA records the graphs (tests marked gpu). Elsewhere a stand-in runs the recorded passes again on
the tensors that a graph would read, which shows that everything a micro-batch differs in is copied
there, and that padding to common sizes changes nothing.
"""

import functools
import gc
import sys
import weakref

import pytest
import torch

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.errors import ModelError
from postgrad.model import attention, attention_cuda
from postgrad.model.attention_cuda import varlen_attention
from postgrad.model.lora import lora_layers
from postgrad.train import graphs as module
from postgrad.train.graphs import Graphs, power_of_two, tensors
from postgrad.train.preflight.device import graphs_match
from postgrad.train.preflight.measured import TOLERANCES
from postgrad.train.sft import Room, SupervisedFineTuning
from postgrad.types import LossSum
from training import load_model, make_rows, make_training, timeless, weights_of

LONGEST, CAPACITY = 40, 96


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What the kernel of a device computes, from the ends of the documents alone."""
    document = torch.bucketize(torch.arange(len(query)), cu_seq_q[1:], right=True)
    seen = (document[:, None] == document) & torch.ones(len(query), len(query)).tril().bool()
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query, k) * scale
    assert max_q >= int(cu_seq_q.diff().max())
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture
def recorder(monkeypatch):
    """A device that records; a list of the passes recorded."""
    recorded = []

    def capture(passes, pool):
        loss = LossSum(torch.zeros((), dtype=torch.float64), 0.0)
        recorded.append(passes)

        def replay():
            loss.total.copy_(passes().total)

        return replay, loss

    def realise(q, k, v, layout, scale, softcap, dropout, *, limit):
        return varlen_attention(flash, q, k, v, layout, scale)

    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(module, "free_bytes", lambda: 1 << 30)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(attention, "_realise", realise)
    return recorded


def trained(directory, folder, backward=None, **settings):
    training = make_training(
        directory, folder, epochs=3, capacity=CAPACITY, per_step=2 * CAPACITY, **settings
    )
    training.go(backward=backward)
    return training


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_replayed_micro_batches_train_the_same(tiny_model_dir, tmp_path, recorder, full):
    graphs = Graphs(LONGEST, CAPACITY)
    ours = trained(tiny_model_dir, tmp_path / "graphs", graphs, full=full)
    plain = trained(tiny_model_dir, tmp_path / "plain", full=full)
    assert len(recorder) == len(graphs.recorded) > 0
    assert graphs.replayed > graphs.other
    assert graphs.reason == ""
    for one, other in zip(timeless(ours.run), timeless(plain.run), strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    for name, weight in weights_of(plain.model).items():
        torch.testing.assert_close(weights_of(ours.model)[name], weight, atol=2e-3, rtol=1e-2)


def test_gradients_stay_where_a_graph_adds_to_them(tiny_model_dir, tmp_path, recorder):
    graphs, places = Graphs(LONGEST, CAPACITY), []

    def watched(model, *rest):
        loss = graphs(model, *rest)
        places.append({p.grad.data_ptr() for p in model.parameters() if p.grad is not None})
        return loss

    trained(tiny_model_dir, tmp_path / "run", watched)
    assert len(places) > 10
    assert all(place == places[0] for place in places)


def test_what_cannot_be_recorded_runs_operation_by_operation(
    tiny_model_dir, tmp_path, recorder, monkeypatch
):
    def refused(passes, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(module, "capture", refused)
    graphs = Graphs(LONGEST, CAPACITY)
    ours = trained(tiny_model_dir, tmp_path / "graphs", graphs)
    plain = trained(tiny_model_dir, tmp_path / "plain")
    assert graphs.reason == "operation not permitted when stream is capturing"
    assert (graphs.recorded, graphs.replayed) == ({}, 0)
    for one, other in zip(timeless(ours.run), timeless(plain.run), strict=True):
        assert one == pytest.approx(other, rel=2e-4)


def test_a_graph_that_leaves_no_room_for_another_pass_is_given_up(
    tiny_model_dir, tmp_path, recorder, monkeypatch
):
    free = iter([100, 52, 100, 52])
    monkeypatch.setattr(module, "free_bytes", lambda: next(free))
    graphs = Graphs(LONGEST, CAPACITY)
    trained(tiny_model_dir, tmp_path / "run", graphs)
    assert "beside the graph" in graphs.reason
    assert graphs.recorded == {}


def equal_documents():
    return micro_batches(make_rows(4, shortest=64, longest=64), 256, packed=True)[0]


def test_nothing_is_recorded_before_the_optimizer_has_its_memory(tiny_model_dir, recorder):
    model, graphs, batch = load_model(tiny_model_dir), Graphs(64, 256), equal_documents()
    with attention.training_attention(model):
        for _ in range(2 * module.SEEN):
            graphs(model, SupervisedFineTuning(), batch, batch.supervised)
        assert recorder == []
        model.zero_grad(set_to_none=True)
        graphs(model, SupervisedFineTuning(), batch, batch.supervised)
    assert len(recorder) == 1


def test_a_gradient_that_comes_late_stays_where_it_is_too(tiny_model_dir, recorder):
    model, graphs = load_model(tiny_model_dir, LoraConfig(r=4)), Graphs(64, 256)
    batch, late = equal_documents(), next(iter(lora_layers(model).values()))
    kept = []  # alive, so that no other gradient gets their memory
    with attention.training_attention(model):
        for number in range(module.SEEN + 2):
            late.enabled = number > 0
            model.zero_grad(set_to_none=True)
            graphs(model, SupervisedFineTuning(), batch, batch.supervised)
            kept.append(late.lora_A.grad)
    assert len(recorder) == 1
    assert graphs.replayed > 0
    assert kept[0] is None
    assert len({grad.data_ptr() for grad in kept[1:]}) == 1


def test_who_gives_up_recording_keeps_no_gradients(tiny_model_dir, recorder, monkeypatch):
    def refused(passes, pool):
        raise RuntimeError("no")

    monkeypatch.setattr(module, "capture", refused)
    model, graphs, batch = load_model(tiny_model_dir), Graphs(64, 256), equal_documents()
    with attention.training_attention(model):
        for _ in range(module.SEEN):
            model.zero_grad(set_to_none=True)
            graphs(model, SupervisedFineTuning(), batch, batch.supervised)
    assert graphs.reason == "no"
    kept = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)


def test_without_a_kernel_that_reads_the_ends_nothing_is_recorded(
    tiny_model_dir, tmp_path, monkeypatch
):
    """As in float32: other realisations read a layout's lengths, which a graph does not change."""
    monkeypatch.setattr(module, "capture", lambda *_: pytest.fail("recorded"))
    graphs = Graphs(LONGEST, CAPACITY)
    ours = trained(tiny_model_dir, tmp_path / "graphs", graphs)
    plain = trained(tiny_model_dir, tmp_path / "plain")
    assert "need the flash kernel" in graphs.reason
    for one, other in zip(timeless(ours.run), timeless(plain.run), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def checked(model):
    rows = make_rows(4, seed=5)
    return graphs_match(model, SupervisedFineTuning(), rows, TOLERANCES[torch.float32])


def test_a_replay_is_compared_on_the_rows_before_training(tiny_model_dir, recorder, monkeypatch):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    assert checked(model).passed
    assert len(recorder) == 1
    # a graph that still sees the documents, or the labels, that it was recorded with
    for left in ("ends", "labels"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "tensors", lambda at, left=left: without(at, left))
            found = checked(model)
        assert not found.passed
        assert found.remedy == "set train.cuda_graphs to false"
    monkeypatch.setattr(module, "capture", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checked(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_compared_computes_as_a_step_does(tiny_model_dir, recorder, monkeypatch, dropout):
    """In training mode (float8 is used only there) unless something would be drawn at random."""
    model, modes = load_model(tiny_model_dir, LoraConfig(r=4, lora_dropout=dropout)).eval(), []
    capture = module.capture
    monkeypatch.setattr(module, "capture", lambda *a: modes.append(model.training) or capture(*a))
    rows = make_rows(4, seed=5)
    found = graphs_match(model, SupervisedFineTuning(), rows, TOLERANCES[torch.float32])
    assert found.passed
    assert modes == [not dropout]
    assert not model.training


def without(at, left):
    dropped = at.inputs["layout"].ends if left == "ends" else at.labels
    return [tensor for tensor in tensors(at) if tensor is not dropped]


def test_what_is_not_recorded_passes_and_says_so(tiny_model_dir):
    found = checked(load_model(tiny_model_dir, LoraConfig(r=4)))
    assert found.passed
    assert found.detail.startswith("not recorded, so not used: documents whose ends")


def test_padded_batches_are_left_alone(tiny_model_dir, tmp_path, recorder):
    graphs = Graphs(LONGEST, CAPACITY)
    trained(tiny_model_dir, tmp_path / "run", graphs, packed=False)
    assert recorder == []
    assert graphs.replayed == 0 < graphs.other


@pytest.mark.parametrize("seed", range(5))
def test_a_padded_row_has_the_loss_of_the_row(tiny_model_dir, seed, recorder):
    model, objective = load_model(tiny_model_dir), SupervisedFineTuning()
    rows = make_rows(1 + 2 * seed, seed=seed)
    batch = micro_batches(rows, 1000, packed=True)[0]
    room = Graphs(LONGEST, 300).room(batch)
    assert room.tokens >= batch.tokens
    assert room.tokens % 64 == 0
    with attention.training_attention(model), torch.no_grad():
        padded = objective.loss(model, objective.positions(model, batch, room), batch.supervised)
        plain = objective(model, batch)
    assert float(padded.total) == pytest.approx(float(plain.total), rel=1e-5)


def test_graphs_for_fewer_documents_make_room_for_those_of_more(tiny_model_dir, recorder):
    model, graphs = load_model(tiny_model_dir), Graphs(LONGEST, 1000)
    few, many = (micro_batches(make_rows(n, seed=n), 1000, packed=True)[0] for n in (4, 20))
    with attention.training_attention(model):
        for batch in (few, few, few, many, many):
            model.zero_grad(set_to_none=True)
            graphs(model, SupervisedFineTuning(), batch, batch.supervised)
    assert len(recorder) == 2
    assert [room.documents for room in graphs.recorded] == [32]


def test_sizes_are_few_and_hold_every_batch():
    graphs, rooms = Graphs(LONGEST, 2720), set()
    for seed in range(40):
        for batch in micro_batches(make_rows(200, seed=seed), 2720, packed=True):
            room = graphs.room(batch)
            assert batch.tokens <= room.tokens <= max(1.05 * batch.tokens, batch.tokens + 128)
            assert len(batch.lengths) < room.documents
            assert int((batch.weights != 0).sum()) <= room.positions
            rooms.add(room)
    assert len(rooms) < module.MOST


def test_rows_of_equal_documents_keep_their_own_layout():
    rows = make_rows(4, shortest=64, longest=64)
    room = Graphs(64, 256).room(micro_batches(rows, 256, packed=True)[0])
    assert (room.dense, room.tokens, room.documents) == (True, 256, 4)


def test_what_a_graph_of_equal_documents_reads_lives_as_long(tiny_model_dir, recorder, monkeypatch):
    """Its memory would be given to others, and read by every replay, if only a cache held it."""
    read, kernel = [], flash

    @functools.wraps(kernel)
    def watched(query, key, value, cu_seq_q, *rest, **more):
        read.append(weakref.ref(cu_seq_q))
        return kernel(query, key, value, cu_seq_q, *rest, **more)

    monkeypatch.setattr(sys.modules[__name__], "flash", watched)
    model, graphs, batch = load_model(tiny_model_dir), Graphs(64, 256), equal_documents()
    assert graphs.room(batch).dense
    with attention.training_attention(model):
        for _ in range(module.SEEN):
            model.zero_grad(set_to_none=True)
            graphs(model, SupervisedFineTuning(), batch, batch.supervised)
        assert len(recorder) == 1
        read.clear()
        recorder[0]()
    attention_cuda._ends.cache_clear()
    gc.collect()
    assert [ref() is not None for ref in read] == [True] * len(read) != []


@pytest.mark.parametrize("dense", [False, True])
def test_capped_scores_are_not_computed_from_ends_on_the_device(dense):
    """They are bucketed by lengths, which are made up here."""
    lengths = (32, 32) if dense else (40, 24)
    layout = Room(64, 2 if dense else 8, 32, 32, dense).layout(lengths, torch.device("cpu"))
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    with pytest.raises(ModelError, match="ends are on the device"):
        attention.packed_attention(None, q, k, v, None, softcap=1.0, layout=layout)


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (1024, 1024)])
def test_powers_of_two(number, expected):
    assert power_of_two(number) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_device_replays_what_it_recorded(cuda, tiny_model_dir, tmp_path, full):
    """In bf16, 2 % of the loss: the flash kernel adds gradients in no fixed order."""
    found = []
    for graphs in (Graphs(LONGEST, CAPACITY), None):
        training = make_training(
            tiny_model_dir, tmp_path / str(graphs is None), epochs=3, capacity=CAPACITY,
            per_step=2 * CAPACITY, full=full,
        )  # fmt: skip
        training.model.to(cuda)
        if full:
            training.objective = SupervisedFineTuning(autocast=True)
        else:
            for name, parameter in training.model.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        training.go(backward=graphs, eval_steps=10**6)
        found.append([x["train/loss"] for x in training.run.read_metrics() if "train/loss" in x])
        if graphs is not None:
            assert graphs.reason == ""
            assert graphs.replayed > graphs.other
    assert found[0] == pytest.approx(found[1], rel=2e-2)


@pytest.mark.gpu
def test_after_a_recording_that_failed_a_device_goes_on(cuda):
    """Also its generator, which is in a state of its own while something is recorded."""
    torch.manual_seed(3)
    expected = torch.rand(5, device=cuda)
    torch.manual_seed(3)

    def reads_back():
        return LossSum(torch.rand(5, device=cuda).sum().item(), 0.0)

    with pytest.raises(RuntimeError):
        module.capture(reads_back, torch.cuda.graph_pool_handle())
    assert torch.rand(5, device=cuda).equal(expected)
