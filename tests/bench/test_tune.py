"""The tuner: what it chooses among, what it leaves out, and how it goes on after a cut."""

import json
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch

from bench import tune, tune_candidates, tune_problem
from bench.tune import Tuner, buckets, config_of, refined, timed_table
from bench.tune_candidates import (
    PARTS,
    RANKS,
    RATES,
    adapted,
    candidates,
    for_size,
    needed_cases,
    untimed_entry,
    untimed_table,
)
from bench.tune_problem import Bucket, Checker, Tensors, run
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.plan import plan
from lora_kernels.lora_linear.tables import (
    SHARED_BYTES,
    DecodeConfig,
    PassConfig,
    TileConfig,
    load_table,
    read_table,
    write_table,
)

CPU = torch.device("cpu")
TILES = [TileConfig(16, 32, 16, 16, 1, 1), TileConfig(32, 16, 16, 16, 1, 1)]
PASSES = [PassConfig(16, 32, 16, 32, 1, 1), PassConfig(32, 16, 16, 64, 1, 1)]
SMALL = {(part, 16): TILES if part in ("one_pass", "split", "dx") else PASSES for part in PARTS} | {
    ("decode", 16): [DecodeConfig(32, 16, 16, 2, 1, 1), DecodeConfig(16, 16, 16, 1, 1, 1)]
}
BUCKET = Bucket(40, (32, 16), 48, 16)
interpreted = pytest.mark.skipif(not interpreting(), reason="tiles for the interpreter alone")


@pytest.mark.parametrize("arch", RATES)
def test_candidates_are_possible(arch, tmp_path):
    """Each could stand in a table of its architecture, and there are several of each part."""
    assert arch in SHARED_BYTES
    entry = load_table(arch).entries[0]
    for part in PARTS:
        for r in RANKS:
            found = candidates(arch, part, r)
            assert len(found) == len(set(found)) >= 3
            for config in found:
                changed = replace(entry, **{"r": r, "one_pass": candidates(arch, "one_pass", r)[0]})
                table = replace(load_table(arch), entries=(replace(changed, **{part: config}),))
                write_table(table, tmp_path / f"{arch}.json")
                try:
                    read_table(tmp_path / f"{arch}.json")
                except ValueError as error:
                    # What does not fit is found out by compiling, and by nothing else.
                    assert "shared memory" in str(error)


@pytest.mark.parametrize("arch", RATES)
def test_an_untimed_table_is_made_of_sound_candidates(arch):
    """Every configuration of an untimed table is a candidate, in its tiles."""
    table = load_table(arch)
    if table.measured is not None:
        pytest.skip("timed")
    for entry in table.entries:
        for part in PARTS:
            config = getattr(entry, part)
            known = candidates(arch, part, entry.r)
            if isinstance(config, PassConfig):
                assert replace(config, chunk=512) in known
            elif isinstance(config, DecodeConfig):
                assert replace(config, splits=1) in known
            else:
                assert config in known


def test_an_untimed_table_from_what_compiles():
    """The first candidates that compile, of GEMMs the largest of which there are enough."""
    found = {(part, r): candidates("sm_90", part, r) for part in PARTS for r in RANKS}
    table = untimed_table("sm_90", found)
    assert table.measured is None and table.multiprocessors == 132
    by_shape = {(entry.m, entry.n, entry.r): entry for entry in table.entries}
    large, medium, small = (by_shape[m, 4096, 16] for m in (8192, 512, 64))
    assert (large.split.block_n, large.split.descriptors) == (256, True)
    assert (medium.split.block_n, medium.split.descriptors) == (128, True)
    assert (small.split.block_n, small.split.descriptors) == (64, False)
    assert (large.shrink.block_rows, small.shrink.block_rows) == (64, 16)
    assert large.dy_b.chunk > small.dy_b.chunk
    # Few rows are one entry where more rows say the same.
    assert (16, 4096, 16) not in by_shape
    # What does not compile is not chosen.
    without = found | {("split", 16): found["split", 16][1:]}
    assert untimed_entry("sm_90", 8192, 4096, 4096, 16, without).split == found["split", 16][1]


def test_tiles_for_a_size():
    found = [TileConfig(128, 128, 64, 64, 8, 3), TileConfig(64, 64, 64, 64, 4, 3)]
    assert for_size(found, 8192, 4096, 132) == found
    assert for_size(found, 512, 1024, 132) == found[1:]
    assert for_size(found, 16, 64, 132) == found[::-1]


def test_needed_cases_are_those_of_the_compile_report():
    """Descriptors bring the pointer kernels along, GEMMs both widths along the rank; DoRA's scales
    take the place of a bias."""
    tile = TileConfig(128, 128, 64, 64, 8, 3, descriptors=True)
    names = [case.name for case in needed_cases("split", tile)]
    assert len(names) == len(set(names)) == 12
    for words in (
        " descriptors r16",
        " descriptors r64",
        "64 r16",
        "64 r64",
        "x3 heavy",
        "int64",
        "scales",
    ):
        assert any(words in name for name in names)
    names = " ".join(
        case.name for case in needed_cases("decode", DecodeConfig(64, 64, 16, 4, 4, 3))
    )
    assert "k2" in names


def test_buckets_cover_the_models():
    wanted = buckets()
    keys = {(bucket.k, bucket.n) for bucket in wanted}
    assert {(576, (576,)), (576, (576, 192, 192)), (2048, (8192, 8192)), (14336, (4096,))} <= keys
    assert {bucket.m for bucket in wanted} == {1, 16, 512, 2048, 8192}
    assert {bucket.r for bucket in wanted} == {16, 64}
    assert len({bucket.key for bucket in wanted}) == len(wanted) == 12 * 5 * 2
    # Training a large model comes first: it is timed however short the time.
    assert wanted[0] == Bucket(2048, (4096, 1024, 1024), 4096, 16)


def test_refinements():
    decode = DecodeConfig(64, 64, 16, 4, 4, 3)
    assert {c.splits for c in refined("decode", decode, Bucket(1, (64,), 512, 16))} == {1, 2, 4, 8}
    chunks = {config.chunk for config in refined("d_a", PASSES[0], BUCKET)}
    assert chunks == {128, 256, 512, 1024}
    assert refined("shrink", PASSES[0], BUCKET) == refined("split", TILES[0], BUCKET) == []
    for part, config in (("decode", decode), ("dx", TILES[0]), ("d_a", PASSES[0])):
        assert config_of(part, json.dumps(asdict(config))) == config


@pytest.mark.kernel
@interpreted
@pytest.mark.parametrize("part", PARTS)
def test_a_right_result_is_no_fault_and_a_wrong_one_is(part):
    bucket = Bucket(13, (32, 16), 48, 16) if part == "decode" else BUCKET
    checker = Checker(bucket, torch.float16, CPU)
    config = SMALL[part, 16][0]
    assert checker.fault(part, config) is None

    def scaled(part, config, tensors):
        results = run(part, config, tensors)
        return [*results[:-1], results[-1] * 1.02]

    def failing(part, config, tensors):
        raise RuntimeError("out of resource: shared memory\nmore")

    def not_a_number(part, config, tensors):
        results = run(part, config, tensors)
        results[0].view(-1)[-1] = torch.nan
        return results

    assert "times plain torch's error" in checker.fault(part, config, scaled)
    assert checker.fault(part, config, failing) == "RuntimeError: out of resource: shared memory"
    assert "NaN" in checker.fault(part, config, not_a_number)


def test_the_library_computes_the_same():
    """What is timed as the library is what the parts make together."""
    t = Tensors.draw(BUCKET, torch.float64, CPU)
    *ys, s = run("library_forward", None, t)
    expected = tune_problem.specification("one_pass", t)
    torch.testing.assert_close([*ys, s], expected)
    dx, _, *d_bs = run("library_backward", None, t)
    p, *expected_d_bs = tune_problem.specification("dy_b", t)
    torch.testing.assert_close(d_bs, expected_d_bs)
    torch.testing.assert_close(dx, tune_problem.specification("dx", replace(t, p=p))[0])


class FakeTimer:
    """Seconds by rule: configurations get slower in the order of the candidates."""

    def __init__(self, library=1.0):
        self.library = library
        self.calls = 0

    def __call__(self, calls, inputs):
        self.calls += 1
        assert inputs >= 1
        if list(calls) == [""]:
            return {"": self.library}
        return {name: 0.01 * (2 + index) for index, name in enumerate(reversed(list(calls)))}


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "refined", lambda part, best, bucket: [])

    def make(timer, header="here"):
        return Tuner(
            SMALL, CPU, tmp_path / "state.json", {"gpu": header}, timer, dtype=torch.float16
        )

    return make


@pytest.mark.kernel
@interpreted
def test_the_fastest_right_configuration_is_taken(tuner):
    def wrong_with_the_second_tile(part, config, tensors):
        results = run(part, config, tensors)
        return [result * 1.5 for result in results] if config == TILES[1] else results

    timing = tuner(FakeTimer())
    timing.launch = wrong_with_the_second_tile
    (entry,) = timing.tune([BUCKET], deadline=1.0, clock=lambda: 0.0)
    # The timer finds the last one fastest; of the GEMMs it never saw the last one.
    assert (entry.one_pass, entry.split, entry.dx) == (TILES[0],) * 3
    assert replace(entry.shrink, chunk=64) == PASSES[1]
    assert len(timing.faults) == 3 and all("TileConfig" in fault for fault in timing.faults)
    assert (entry.m, entry.n, entry.k, entry.r, entry.bits) == (40, 48, 48, 16, 16)
    # One pass: 0.02 and 3 x 0.02 of the backward pass; split has a kernel more.
    assert entry.method == "one_pass"


@pytest.mark.kernel
@interpreted
def test_the_method_with_the_least_time(tuner):
    timing = tuner(FakeTimer(library=0.001))
    (entry,) = timing.tune([BUCKET], 1.0, lambda: 0.0)
    assert entry.method == "library"
    times = timing.times[BUCKET.key]
    times["library_forward"][""] = times["library_backward"][""] = 1.0
    assert timing.entry(BUCKET).method == "one_pass"
    times["one_pass"] = dict.fromkeys(times["one_pass"], 0.5)
    assert timing.entry(BUCKET).method == "split"
    # Without a sound configuration a kernel cannot be the fastest, and has an untimed one.
    times["split"] = {}
    entry = timing.entry(BUCKET)
    assert entry.method == "one_pass" and entry.split == TILES[0]


@pytest.mark.kernel
@interpreted
def test_few_rows_count_decoding_and_no_backward(tuner):
    timing = tuner(FakeTimer())
    bucket = Bucket(3, (32,), 48, 16)
    (entry,) = timing.tune([bucket], 1.0, lambda: 0.0)
    times = timing.times[bucket.key]
    assert times["decode"] and entry.method == "one_pass"
    times["one_pass"] = times["decode"] = {}
    times["library_forward"][""], times["library_backward"][""] = 0.001, 1e9
    assert timing.entry(bucket).method == "library"


@pytest.mark.kernel
@interpreted
def test_a_run_goes_on_where_it_was_cut_off(tuner):
    """Nothing is begun after the deadline, nothing timed twice, and nothing of another GPU kept."""
    wanted = [BUCKET, Bucket(20, (32,), 32, 16)]
    ticks = iter([0.0, 2.0])
    first = tuner(FakeTimer())
    assert len(first.tune(wanted, deadline=1.0, clock=lambda: next(ticks))) == 1
    second = tuner(FakeTimer())
    second.resume()
    entries = second.tune(wanted, 1.0, lambda: 0.0)
    assert len(entries) == 2 and second.timer.calls == first.timer.calls
    assert entries[0] == first.entry(BUCKET)
    third = tuner(FakeTimer(), header="another")
    third.resume()
    assert third.times == {}


@pytest.mark.kernel
@interpreted
def test_a_shape_that_cannot_be_timed_is_passed_over(tuner):
    """Too large for the memory, say: it is told, and the next shapes are timed."""
    timing = tuner(FakeTimer())

    def too_large(part, config, tensors):
        if config is None and tensors.x.shape[0] == BUCKET.m:
            raise RuntimeError("CUDA out of memory\nTried to allocate")
        return run(part, config, tensors)

    fake = timing.timer

    def timer(calls, inputs):
        for call in calls.values():
            call(0)
        return fake(calls, inputs)

    timing.launch, timing.timer = too_large, timer
    (entry,) = timing.tune([BUCKET, Bucket(20, (32,), 32, 16)], 1.0, lambda: 0.0)
    assert entry.m == 20
    assert timing.faults == [f"{BUCKET.key}: CUDA out of memory"]


@pytest.mark.kernel
@interpreted
def test_nothing_that_can_be_timed_leaves_the_rule(tuner):
    timing = tuner(FakeTimer())
    timing.tune([BUCKET], 1.0, lambda: 0.0)
    timing.times[BUCKET.key] = {part: {} for part in timing.times[BUCKET.key]}
    assert timing.entry(BUCKET).method == "auto"


def test_a_timed_table_keeps_the_untimed_ranks(tmp_path):
    found = {(part, r): candidates("sm_90", part, r) for part in PARTS for r in RANKS}
    timed = [
        replace(untimed_entry("sm_90", m, 6144, 4096, 16, found), method="split")
        for m in (2048, 8192)
    ]
    rates = {"flops": 7e14, "bytes_per_second": 4e12, "multiprocessors": 132.0}
    measured = {"gpu": "a", "torch": "b", "triton": "c", "commit": "d", "date": "e"}
    table = timed_table("sm_90", rates, measured, timed, found)
    assert table.entries[:2] == tuple(timed)
    assert {entry.r for entry in table.entries[2:]} == {32, 64}
    write_table(table, tmp_path / "sm_90.json")
    assert read_table(tmp_path / "sm_90.json") == table


def test_chunks_and_splits_follow_the_shape():
    config = PassConfig(32, 256, 16, 512, 4, 2)
    assert adapted("dy_b", config, 8192, 8192, 4096, 16, 132).chunk == 512
    assert adapted("dy_b", config, 64, 8192, 4096, 16, 132).chunk == 128
    assert adapted("shrink", config, 64, 8192, 4096, 16, 132) == config
    decode = DecodeConfig(64, 64, 16, 1, 4, 3)
    assert adapted("decode", decode, 1, 4096, 4096, 16, 132).splits == 4
    assert adapted("decode", decode, 1, 28672, 4096, 16, 132).splits == 1


class FakePool:
    """In place of the processes: the faults of each candidate by a rule."""

    faults_of = staticmethod(lambda arch, part, r, index: [])

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def map(self, function, *jobs):
        assert function is tune_candidates.compile_indexed
        return [self.faults_of(*job) for job in zip(*jobs, strict=True)]


def test_what_compiles_with_a_fault_is_left_out(monkeypatch):
    monkeypatch.setattr(tune_candidates, "ProcessPoolExecutor", FakePool)
    found = tune_candidates.fitting("sm_90")
    assert found == {(part, r): candidates("sm_90", part, r) for part in PARTS for r in RANKS}
    monkeypatch.setattr(
        FakePool, "faults_of", lambda self, arch, part, r, index: ["2 spills"] * (index == 0)
    )
    found = tune_candidates.fitting("sm_90")
    assert found["dx", 32] == candidates("sm_90", "dx", 32)[1:]
    monkeypatch.setattr(
        FakePool, "faults_of", lambda self, arch, part, r, index: ["2 spills"] * (part == "d_a")
    )
    with pytest.raises(RuntimeError, match="sm_90: no candidate of d_a for rank 16 compiles"):
        tune_candidates.fitting("sm_90")


@pytest.mark.compile
@pytest.mark.slow
def test_candidates_are_compiled_where_no_gpu_is(monkeypatch):
    """In processes of their own, which do not interpret. One of gfx942's candidates spills."""
    monkeypatch.setattr(tune_candidates, "PARTS", ("dy_b",))
    monkeypatch.setattr(tune_candidates, "RANKS", (64,))
    before = os.environ.get("TRITON_INTERPRET")
    found = tune_candidates.fitting("gfx942")["dy_b", 64]
    assert os.environ.get("TRITON_INTERPRET") == before
    assert PassConfig(32, 128, 64, 512, 8, 2) in candidates("gfx942", "dy_b", 64)
    assert found and PassConfig(32, 128, 64, 512, 8, 2) not in found


def test_without_a_gpu_an_architecture_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 2
    assert "--arch" in capsys.readouterr().out


def test_a_tuned_plan_is_taken(tmp_path, monkeypatch):
    """What the tuner writes is what the plan reads."""
    found = {(part, r): candidates("sm_90", part, r) for part in PARTS for r in RANKS}
    entry = replace(untimed_entry("sm_90", 2048, 4096, 4096, 16, found), method="library")
    table = timed_table("sm_90", asdict(RATES["sm_90"]), {"gpu": "a"}, [entry], found)
    write_table(table, tmp_path / "sm_90.json")
    read = read_table(tmp_path / "sm_90.json")
    # By module: the package `lora_kernels.lora_linear` is hidden behind the function of that name.
    monkeypatch.setattr(sys.modules[plan.__module__], "load_table", lambda arch: read)
    plan.cache_clear()
    try:
        chosen = plan(2048, 4096, 4096, 16, torch.bfloat16, "sm_90")
    finally:
        plan.cache_clear()
    assert (chosen.method, chosen.reason) == ("library", "timed fastest")
