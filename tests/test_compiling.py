"""Compiled parts give the losses of plain ones, and exact mode refuses them."""

import numpy as np
import pytest

import mmpre
from mmpre.data.shards import shard_writer
from mmpre.recipes.bert import bert
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions


def test_exact_mode_refuses_compiled_code():
    with pytest.raises(ValueError, match="exact promises equal bits, which compiled code does not give; leave out one"):
        RunOptions(exact=True, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_has_the_losses_of_a_plain_one_dropout_included(tmp_path, precision):
    rng = np.random.default_rng(0)
    with shard_writer(tmp_path / "texts") as sink:
        for i in range(40):
            words = rng.integers(0, 50, size=rng.integers(3, 30))
            sink.write({"__key__": f"t{i:02d}", "txt": " ".join(f"{word}" for word in words)})
    numbers = dict(
        data=(str(tmp_path / "texts"),), width=32, depth=2, heads=2, length=64, batch=8, micro_batches=1, steps=8,
        warmup=1, lr=1e-3, dropout=0.1,
    )  # fmt: skip

    def losses(name: str, compiled: bool) -> list[float]:
        options = RunOptions(workers=0, threads=1, log_every=1, precision=precision, compile=compiled)
        run = mmpre.train(bert, out=tmp_path / name, options=options, **numbers)
        return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]

    plain, compiled = losses("plain", False), losses("compiled", True)
    assert len(plain) == 8 and plain[-1] < plain[0]
    np.testing.assert_allclose(compiled, plain, rtol=1e-4 if precision == "fp32" else 5e-3)
