"""Two ranks, gloo: the same codebook on both, whatever each of them gets to see."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from torch import Tensor

import vqtriton
from vqtriton import VectorQuantize, kmeans, metrics, nearest_code

DIM, SIZE = 5, 16


def batch(step: int, rows: int = 48) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(step)) + 1


def shares(x: Tensor, world_size: int, uneven: bool) -> list[Tensor]:
    """How the ranks divide a batch: evenly, or all to the last with nothing for the first."""
    if not uneven:
        return list(x.chunk(world_size))
    return [x[:0]] * (world_size - 1) + [x]


def state(vq: VectorQuantize) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in vq.state_dict().items()}


def steps(vq: VectorQuantize, rank: int, world_size: int, uneven: bool) -> dict[str, Tensor]:
    for step in range(6):
        x = shares(batch(step), world_size, uneven and step % 2 == 1)[rank].requires_grad_()
        vq(x).loss.backward()
        if vq.codebook.requires_grad:
            torch.distributed.all_reduce(vq.codebook.grad)
            with torch.no_grad():
                vq.codebook -= 0.1 * vq.codebook.grad
            vq.codebook.grad = None
    return state(vq)


def assert_equal(results: list[dict[str, Tensor]]) -> None:
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


OPTIONS = {
    "ema": {},
    "gradient": {"codebook_update": "gradient"},
    "kmeans": {"kmeans_init": True},
    "revival": {"threshold_ema_dead_code": 2, "decay": 0.5},
    "gradient, revival": {
        "codebook_update": "gradient",
        "threshold_ema_dead_code": 2,
        "decay": 0.5,
        "kmeans_init": True,
    },
}


def train_all(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    # each rank with a seed of its own, and built before there is a process group
    torch.manual_seed(rank)
    modules = {
        (name, uneven): VectorQuantize(DIM, SIZE, **options)
        for name, options in OPTIONS.items()
        for uneven in (False, True)
    }
    ranks.join(rank, world_size, meeting_point)
    return {
        f"{name}{', an empty rank' if uneven else ''}: {tensor}": value
        for (name, uneven), vq in modules.items()
        for tensor, value in steps(vq, rank, world_size, uneven).items()
    }


def test_codebooks_are_equal(tmp_path: Path) -> None:
    results = ranks.run(train_all, tmp_path)
    assert_equal(results)
    assert all(value.isfinite().all() for value in results[0].values())
    # what two ranks learn is what one does
    torch.manual_seed(0)
    alone = steps(VectorQuantize(DIM, SIZE), 0, 1, uneven=False)
    for name, value in alone.items():
        torch.testing.assert_close(results[0][f"ema: {name}"], value, rtol=1e-5, atol=1e-6)


def masked_rank(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    vq = VectorQuantize(DIM, SIZE, kmeans_init=True, threshold_ema_dead_code=1)
    for step in range(4):
        x = batch(step)
        mask = torch.full((48,), rank == 1)
        if rank == 0:
            x = x * torch.nan
        assert vq(x, mask=mask).loss.isfinite()
    return state(vq)


def test_a_masked_rank_takes_part(tmp_path: Path) -> None:
    results = ranks.run(masked_rank, tmp_path)
    assert_equal(results)
    assert results[0]["codebook"].isfinite().all()
    assert results[0]["codebook"].std() > 0.3


def resumed(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    # only rank 0 has read the checkpoint, as is common with DDP
    torch.manual_seed(rank)
    vq = VectorQuantize(DIM, SIZE, kmeans_init=True)
    if rank == 0:
        trained = VectorQuantize(DIM, SIZE, kmeans_init=True)
        trained(batch(0))
        vq.load_state_dict(trained.state_dict())
    ranks.join(rank, world_size, meeting_point)
    vq(batch(1).chunk(world_size)[rank])
    return state(vq)


def test_a_checkpoint_read_by_one_rank_reaches_all(tmp_path: Path) -> None:
    assert_equal(ranks.run(resumed, tmp_path))


def data_parallel(rank: int, world_size: int, meeting_point: str, update: str) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    ranks.join(rank, world_size, meeting_point)
    vq = VectorQuantize(DIM, SIZE, codebook_update=update, threshold_ema_dead_code=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), vq)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        out = ddp(batch(step).chunk(world_size)[rank])
        optimizer.zero_grad()
        (out.loss + out.quantized.square().mean()).backward()
        optimizer.step()
    return state(vq) | {"encoder": model[0].weight.detach()}


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_distributed_data_parallel(tmp_path: Path, update: str) -> None:
    assert_equal(ranks.run(functools.partial(data_parallel, update=update), tmp_path))


def one_rank_apart(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    vq = VectorQuantize(DIM, SIZE, sync_codebook=False)
    ranks.join(rank, world_size, meeting_point)
    # no collective: only one rank trains, and does not wait for the other
    if rank == 1:
        vq(batch(0))
    return state(vq)


def test_synchronisation_can_be_turned_off(tmp_path: Path) -> None:
    results = ranks.run(one_rank_apart, tmp_path)
    assert not torch.equal(results[0]["codebook"], results[1]["codebook"])


class Counting(VectorQuantize):
    """With a buffer that float32 cannot hold."""

    def __init__(self) -> None:
        super().__init__(DIM, SIZE)
        self.register_buffer("seen", torch.tensor(20_000_001))


def counted_rows(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    vq = Counting()
    vq.seen += rank
    vq(batch(0))
    return state(vq)


def test_a_broadcast_rounds_nothing(tmp_path: Path) -> None:
    results = ranks.run(counted_rows, tmp_path)
    assert_equal(results)
    assert results[0]["seen"] == 20_000_001


def count_collectives(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    vq = VectorQuantize(DIM, SIZE, threshold_ema_dead_code=1)
    vq(batch(0))
    calls = 0
    all_reduce = torch.distributed.all_reduce

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    vq(batch(1))
    return {"calls": torch.tensor(calls)}


def test_one_collective_a_step(tmp_path: Path) -> None:
    assert [result["calls"].item() for result in ranks.run(count_collectives, tmp_path)] == [1, 1]


def clustered(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    x = torch.cat([torch.zeros(60, DIM), 9 * batch(0, 200)])
    found = {}
    for init in ("random", "k-means++"):
        for name, share in {
            "even": list(x.chunk(world_size)),
            # no tensor from which a rank could learn D
            "no batch": [[]] * (world_size - 1) + [list(x.split(33))],
            "no row": [[x[:0]]] * (world_size - 1) + [list(x.split(33))],
            "no finite row": [x * torch.nan] * (world_size - 1) + [x],
        }.items():
            rows = []
            found[f"{init}, {name}"] = kmeans(
                share[rank],
                SIZE,
                12,
                # each rank with a seed of its own
                torch.Generator().manual_seed(rank),
                init=init,
                sync=True,
                callback=lambda *row, rows=rows: rows.append(row),
            )
            found[f"{init}, {name}: progress"] = torch.tensor(rows, dtype=torch.float64)
    return found


def test_kmeans_of_all_ranks(tmp_path: Path) -> None:
    results = ranks.run(clustered, tmp_path)
    assert_equal(results)
    x = torch.cat([torch.zeros(60, DIM), 9 * batch(0, 200)])
    alone = (x - kmeans(x, SIZE, 12, torch.Generator().manual_seed(0))[nearest(x)]).square().sum()
    for name, value in results[0].items():
        if name.endswith("progress"):
            _, inertia, num_empty = value[-1]
            assert num_empty == 0
            assert inertia < 1.3 * alone
        else:
            assert value.unique(dim=0).shape[0] == SIZE


def single_code(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    x = batch(0, 5 if rank == 1 else 0)
    return {init: kmeans(x, 1, 3, init=init, sync=True) for init in ("random", "k-means++")}


def test_fewer_codes_than_ranks(tmp_path: Path) -> None:
    """The rows are on the rank that no place of a single code belongs to."""
    results = ranks.run(single_code, tmp_path)
    assert_equal(results)
    for value in results[0].values():
        torch.testing.assert_close(value, batch(0, 5).mean(0, keepdim=True))


def drawn_over_ranks(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    found = {}
    # few rows on one rank, at a place of their own; many on the other
    x = batch(rank, 8 if rank == 0 else 4000) + (1000 if rank == 0 else 0)
    for seed in range(5):
        source = torch.Generator().manual_seed(2 * seed + rank)
        found[f"start {seed}"] = kmeans(x, SIZE, 0, source, sync=True)
    # with equal seeds on both: row n of one is drawn as often as that of the other
    x = torch.stack([torch.arange(100.0), torch.full((100,), float(rank))], 1)
    for seed in range(30):
        found[f"equal seed {seed}"] = kmeans(
            x, 4, 0, torch.Generator().manual_seed(seed), sync=True
        )
    # many rows that are codes, a few near one, a few far from all: the last on rank 1 alone
    x = torch.zeros(300, DIM)
    x[:100] += 1e-3 * batch(rank, 100)
    if rank == 1:
        x[100:105] = 100 * batch(5, 5)
    source = torch.Generator().manual_seed(rank)
    found["anew"] = kmeans(x, SIZE, 1, source, sync=True)
    # of the moving average of a single step nothing is left but the batch
    vq = VectorQuantize(DIM, SIZE, decay=0.0, threshold_ema_dead_code=1)
    vq.codebook.fill_(50)
    vq(batch(rank, 5))
    found["revived"] = vq.codebook.clone()
    return found


def test_draws_are_rows_of_all_ranks(tmp_path: Path) -> None:
    """Whichever rank they are on, and each a row: no sum of two."""
    results = ranks.run(drawn_over_ranks, tmp_path)
    assert_equal(results)
    found = results[0]
    few, many = batch(0, 8) + 1000, batch(1, 4000)
    starts = torch.stack([found[f"start {seed}"] for seed in range(5)]).view(-1, DIM)
    assert (starts[:, None] == torch.cat([few, many])).all(-1).any(1).all()
    # of 80 draws about one in 500; an equal share for each rank would be half
    assert (starts.amin(1) > 500).sum() <= 4
    drawn = torch.stack([found[f"equal seed {seed}"] for seed in range(30)])
    assert 30 < drawn[:, :, 1].sum() < 90
    # 120 draws: with the same numbers on both ranks, half of them would be twice there
    twice = sum(4 - place.unique().numel() for place in drawn[:, :, 0])
    assert twice <= 8
    far = 100 * batch(5, 5)
    assert (found["anew"][:, None] == far).all(-1).any(0).all()
    rows = torch.cat([batch(0, 5), batch(1, 5)])
    is_row = (found["revived"][:, None] == rows).all(-1).any(1)
    # all but the one that was chosen, which is a mean of rows
    assert is_row.sum() >= SIZE - 1
    assert found["revived"][is_row].unique(dim=0).shape[0] > 5


def nearest(x: Tensor) -> Tensor:
    return nearest_code(x, kmeans(x, SIZE, 12, torch.Generator().manual_seed(0)))


def clustered_badly(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    x = batch(0)

    def fails_in_pass(number: int) -> Callable[[], list[Tensor]]:
        passes = itertools.count()

        def rows() -> list[Tensor]:
            if rank == 1 and next(passes) == number:
                raise OSError("the disk is gone")
            return [x]

        return rows

    texts = []
    for rows in (
        # once: the first pass draws the codes to start from
        fails_in_pass(0),
        fails_in_pass(1),
        [x] if rank == 0 else ["x"],
        x if rank == 0 else x[:, 1:],
        x * torch.nan,
        [],
        # refused before a row is read
        x if rank == 0 else x.long(),
        x if rank == 0 else iter([x]),
    ):
        with pytest.raises((OSError, RuntimeError, TypeError, ValueError)) as raised:
            kmeans(rows, SIZE, sync=True)
        texts.append(str(raised.value))
    want = [
        ["1 other ranks failed", "the disk is gone"][rank],
        ["1 other ranks failed", "the disk is gone"][rank],
        ["1 other ranks failed", "batch 0 of x: x is a str"][rank],
        "x has vectors of size 4 on one rank and 5 on another",
        "no finite row",
        "no finite row",
        ["1 other ranks failed", "x is a torch.int64 tensor"][rank],
        ["1 other ranks failed", "can be read only once"][rank],
    ]
    for text, words in zip(texts, want, strict=True):
        assert words in text, (text, words)

    def logs(iteration: int, *others: object) -> None:
        if rank == 1 and iteration == 0:
            raise OSError("the log is full")

    # among others, and in the last
    for iters in (9, 1):
        with pytest.raises((OSError, RuntimeError)) as raised:
            kmeans(x, SIZE, iters, sync=True, callback=logs)
        assert ["1 other ranks failed", "the log is full"][rank] in str(raised.value)
    # and the ranks are still in step
    return {"codebook": kmeans(x, SIZE, 2, torch.Generator().manual_seed(rank), sync=True)}


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    start = time.monotonic()
    assert_equal(ranks.run(clustered_badly, tmp_path))
    # nobody waited for the other until the time was up
    assert time.monotonic() - start < 18


def compiled(rank: int, world_size: int, meeting_point: str, update: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    found = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(rank)
        vq = VectorQuantize(DIM, SIZE, codebook_update=update, threshold_ema_dead_code=0.1)
        model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), vq)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = ddp
        for i in range(4):
            if i == 1 and name == "compiled":
                # after a first step, in which the ranks meet
                step = torch.compile(ddp, backend="aot_eager")
            torch.manual_seed(100 * i + rank)
            out = step(batch(i).chunk(world_size)[rank])
            optimizer.zero_grad()
            (out.loss + out.quantized.square().mean()).backward()
            optimizer.step()
        found |= {f"{name}: {key}": value for key, value in state(vq).items()}
        found[f"{name}: encoder"] = model[0].weight.detach().clone()
    return found


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_compiled_distributed_data_parallel(tmp_path: Path, update: str) -> None:
    results = ranks.run(functools.partial(compiled, update=update), tmp_path, seconds=80)
    assert_equal(results)
    for name, value in results[0].items():
        if name.startswith("eager"):
            other = results[0][name.replace("eager", "compiled")]
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def fully_sharded(rank: int, world_size: int, meeting_point: str, update: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks.join(rank, world_size, meeting_point)
    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for name in ("alone", "sharded"):
        torch.manual_seed(0)
        options = {"threshold_ema_dead_code": 0.1, "kmeans_init": True} if update == "ema" else {}
        vq = VectorQuantize(DIM, SIZE, codebook_update=update, **options)
        vq.sync_codebook = name == "sharded"
        model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), vq)
        if name == "sharded":
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(4):
            torch.manual_seed(i)
            # with one rank the whole batch: the means of halves are those of the whole
            x = batch(i) if name == "alone" else batch(i).chunk(world_size)[rank]
            out = model(x)
            optimizer.zero_grad()
            (out.loss + out.quantized.square().mean()).backward()
            optimizer.step()
        for key, value in model.state_dict().items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[f"{name}: {key}"] = whole.detach().clone()
    return found


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_fully_sharded_data_parallel(tmp_path: Path, update: str) -> None:
    """FSDP2: buffers are whole on each rank, a codebook that is a parameter is sharded."""
    results = ranks.run(functools.partial(fully_sharded, update=update), tmp_path)
    assert_equal(results)
    # torch 2.8 on CPUs adds the ranks' gradients up where it should take their mean, those of a
    # model of linear layers as well
    if update == "gradient" and not torch.__version__.startswith("2.8."):
        # no draws, so what two ranks learn is what one does
        for name, value in results[0].items():
            if name.startswith("alone"):
                other = results[0][name.replace("alone", "sharded")]
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def sharded_in_halves(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ranks.join(rank, world_size, meeting_point)
    torch.manual_seed(0)
    vq = VectorQuantize(DIM, SIZE, codebook_update="gradient")
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), vq)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = vq.codebook.full_tensor().detach().clone()
    for i in range(3):
        out = model(batch(i).chunk(world_size)[rank].bfloat16())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    codebook = vq.codebook.full_tensor().detach()
    assert codebook.dtype == torch.float32
    assert not torch.equal(codebook, before)
    return {"codebook": codebook}


def test_sharded_with_mixed_precision(tmp_path: Path) -> None:
    """There forward sees a copy in half precision, which is not to be made float32."""
    assert_equal(ranks.run(sharded_in_halves, tmp_path))


def sharded_in_vain(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks.join(rank, world_size, meeting_point)
    mesh = init_device_mesh("cpu", (world_size,))
    for options in ({"kmeans_init": True}, {"threshold_ema_dead_code": 1.0}):
        vq = VectorQuantize(DIM, SIZE, codebook_update="gradient", **options)
        with pytest.raises(ValueError, match=f"codebook is sharded.* {next(iter(options))}"):
            fully_shard(torch.nn.Sequential(vq), mesh=mesh)
    # without values, codes may be loaded later; and if they are not, the step says so
    with torch.device("meta"):
        vq = VectorQuantize(DIM, SIZE, codebook_update="gradient", kmeans_init=True)
    model = torch.nn.Sequential(vq)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    vq.reset_parameters()
    with pytest.raises(ValueError, match="codebook is sharded"):
        model(batch(0))
    with pytest.raises(ValueError, match="codebook is sharded"):
        vq.set_codebook(torch.randn(SIZE, DIM))
    with pytest.raises(ValueError, match=r"vq\.codebook is sharded"):
        vqtriton.save(_plain(vq), "nowhere")
    return {}


def _plain(vq: VectorQuantize) -> VectorQuantize:
    """FSDP2 gives a module a class of its own."""
    vq.__class__ = VectorQuantize
    return vq


def told_apart(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    found = {}
    x = batch(rank) + rank
    for update in ("ema", "gradient"):
        for name, tell in {
            "set": lambda vq, x=x: vq.set_codebook(kmeans(x, SIZE, 2)),
            "reset some": lambda vq, x=x: vq.reset_codes(torch.arange(4), x),
            "reset": lambda vq: vq.reset_parameters(),
            "flag": lambda vq: vq.is_initialized.fill_(False),
        }.items():
            torch.manual_seed(rank)
            vq = VectorQuantize(DIM, SIZE, codebook_update=update)
            vq(x)
            tell(vq)
            vq(x)
            found |= {f"{update}, {name}: {key}": value for key, value in state(vq).items()}
    return found


def test_what_ranks_are_told_apart_they_share_with_the_next_step(tmp_path: Path) -> None:
    assert_equal(ranks.run(told_apart, tmp_path))


def sharded_flat(rank: int, world_size: int, meeting_point: str, update: str) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    ranks.join(rank, world_size, meeting_point)
    torch.manual_seed(0)
    vq = VectorQuantize(DIM, SIZE, codebook_update=update)
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), vq)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
        losses = []
        for i in range(3):
            out = sharded(batch(i))
            optimizer.zero_grad()
            (out.loss + out.quantized.square().mean()).backward()
            optimizer.step()
            losses.append(out.loss.detach())
    return {"losses": torch.stack(losses)}


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_sharded_by_the_first_fsdp(tmp_path: Path, update: str) -> None:
    results = ranks.run(functools.partial(sharded_flat, update=update), tmp_path)
    assert_equal(results)
    assert results[0]["losses"].isfinite().all()


def test_what_sharding_would_lose_is_refused(tmp_path: Path) -> None:
    ranks.run(sharded_in_vain, tmp_path)


def metered(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    # built before there is a process group
    meter, idle = metrics.Meter(SIZE), metrics.Meter(SIZE)
    ranks.join(rank, world_size, meeting_point)
    for step in range(3):
        meter.update(torch.randint(-1, SIZE // 2 * (rank + 1), (7, 5)))
        if rank == 1:
            idle.update(torch.full((step + 1,), 2, dtype=torch.int32))
    alone = meter.compute(sync=False)
    found = {f"all {name}": t for name, t in meter.compute()._asdict().items()}
    for name, tensor in meter.compute()._asdict().items():
        # what others counted is not kept
        assert torch.equal(tensor, found[f"all {name}"])
    assert torch.equal(meter.compute(sync=False).counts, alone.counts)
    found["idle"] = idle.compute().counts
    with pytest.MonkeyPatch.context() as patch:
        # as on a GPU, where values are not looked at
        patch.setattr(metrics, "_check_tally", lambda found: None)
        idle.update(torch.tensor([SIZE] if rank == 0 else [0]))
    with pytest.raises(IndexError, match="indices has 1 values outside"):
        idle.compute()
    return found | {"alone": alone.counts}


def test_a_meter_adds_up_the_ranks(tmp_path: Path) -> None:
    results = ranks.run(metered, tmp_path)
    alone = [result.pop("alone") for result in results]
    assert_equal(results)
    found = results[0]
    assert torch.equal(found["all counts"], alone[0] + alone[1])
    assert torch.equal(found["all perplexity"], metrics.perplexity(alone[0] + alone[1]))
    assert torch.equal(found["all usage"], metrics.usage(alone[0] + alone[1]))
    assert found["idle"].tolist() == [0.0, 0.0, 6.0] + [0.0] * (SIZE - 3)


def dropped_levels(rank: int, world_size: int, meeting_point: str) -> dict[str, Tensor]:
    ranks.join(rank, world_size, meeting_point)
    results, seen = {}, set()
    for name, options in {
        "ema": {"threshold_ema_dead_code": 1},
        "cosine": {"use_cosine_sim": True},
        "shared": {"shared_codebook": True},
    }.items():
        torch.manual_seed(0)
        rvq = vqtriton.ResidualVectorQuantize(DIM, SIZE, 6, quantize_dropout=True, **options)
        # the ranks draw other numbers of levels
        torch.manual_seed(rank)
        for step in range(8):
            indices, loss = rvq(batch(2 * step + rank))[1:]
            used = int((indices[0] >= 0).sum())
            seen.add((name, step, used))
            assert (indices[:, used:] == -1).all()
            assert not loss[used:].any()
        results |= {f"{name}: {tensor}": value for tensor, value in state(rvq).items()}
    drawn = torch.tensor([used for *_, used in sorted(seen)])
    lowest = drawn.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(drawn, torch.distributed.ReduceOp.MAX)
    # or the test is of nothing
    assert (lowest < drawn).any()
    return results


def test_ranks_may_drop_other_levels(tmp_path: Path) -> None:
    results = ranks.run(dropped_levels, tmp_path)
    assert_equal(results)
    assert all(value.isfinite().all() for value in results[0].values())
