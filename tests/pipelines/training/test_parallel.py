"""Whatever the workers share out, loss and gradients are those of one process. Processes of torch.distributed, without Ray."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import RandomLoader, tiny_config, tiny_model

from molmo_core.config import ConfigError
from molmo_core.nn.lora import adapted_layers, is_adapter
from pipelines.data.config import DataConfig
from pipelines.training.build import build
from pipelines.training.config import LoraConfig
from pipelines.training.mesh import Mesh
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum
from pipelines.training.parallel_config import ParallelConfig
from pipelines.training.parallelize import begin_micro_batch, unit_blocks

CPU = torch.device("cpu")
CASES = {
    "one unit": {},
    "a unit a block": {"unit_blocks": 1, "vision_unit": True, "reshard_after_forward": True},
    "accumulated": {"unit_blocks": 2, "reshard_after_forward": True, "rows": 1},
    "accumulated whole": {"unit_blocks": 2, "whole_gradients": True, "rows": 1},
    "recomputed": {"unit_blocks": 2, "recompute": "full"},
}
LONG = {"shared sequences": {"context": 2}, "shared sequences, accumulated": {"context": 2, "unit_blocks": 1, "rows": 2}}
HYBRID = {
    "hybrid": {"replicate": 2, "unit_blocks": 1},
    "hybrid, accumulated": {"replicate": 2, "unit_blocks": 2, "rows": 1},
    "hybrid, shared sequences": {"replicate": 2, "context": 2},
    "sequences shared by four": {"context": 4, "rows": 4},
    "hybrid, accumulated whole": {"replicate": 2, "unit_blocks": 1, "rows": 1, "whole_gradients": True},
}


class Packs(RandomLoader):
    """Rows of equal length of two packed documents, an image anywhere in the first."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.collate = self.model.build_collator(64, "to_max", include_metadata=False)

    def example(self, stream, step):
        example, before = super().example(stream, step), 3 + stream
        example["input_ids"] = np.append(np.arange(before), example["input_ids"])
        example["labels"] = np.append(np.arange(before), example["labels"])
        example["loss_masks"] = np.append(np.linspace(0, 1, before, dtype=np.float32), example["loss_masks"])
        positions = np.arange(len(example["input_ids"]))
        second = positions >= before + 10
        return example | {"position_ids": positions - second * (before + 10), "subsegment_ids": 10_000 + 100_000 * second}


def config_of(case, workers):
    settings = dict(case)
    base = settings.pop("base", None)
    changes = {"device_batch_size": settings.pop("rows", None), "activation_checkpointing": settings.pop("recompute", "none")}
    changes |= {name: settings.pop(name) for name in ("float8", "compile") if name in settings}
    parallel = ParallelConfig(**settings) if workers > 1 else ParallelConfig()
    model = dataclasses.replace(tiny_model(n_layers=3), bi_directional_attn="within_image")
    data = DataConfig.new(datasets={"random": {"path": "-"}}, pad_to_max=True)
    if base is not None:
        changes |= {"init_from": base, "lora": LoraConfig(rank=4, alpha=8.0)}
    return tiny_config("-", model=model, data=data, num_workers=workers, global_batch_size=8, parallel=parallel, **changes)


def step(case, workers):
    """The losses and gradients of one step, whole; `norms` as the loop sees them."""
    config = config_of(case, workers)
    mesh = Mesh.of(config, CPU)
    model = build(config, CPU, mesh)
    for layer in adapted_layers(model):
        torch.nn.init.constant_(layer.lora_b, 0.01)  # zeros have no part in the gradients
    loader = Packs(config.data, config.model, 8, 64, config.seed, mesh.data_rank, mesh.data_size)
    batches = iter(loader)
    for _ in range(3):  # in the third one rank has images, the others have none
        batch = next(batches)
    weight = all_sum((batch["loss_masks"].clamp(min=0) * (batch["labels"] >= 0)).sum()).item() / mesh.context
    loss = torch.zeros(())
    parts = {name: values.chunk(config.micro_batches) for name, values in batch.items()}
    for i in range(config.micro_batches):
        begin_micro_batch(model, config, last=i == config.micro_batches - 1)
        micro = {name: values[i] for name, values in parts.items()}
        part = model(**micro, loss_divisor=weight / mesh.size, z_loss_weight=1e-4, return_logits=False).loss
        part.backward()
        loss += part.detach()
    squares = Optimizer(model, config.optim).squared_norms()
    values = {f"norm of {group}": all_sum(square).sqrt() for group, square in squares.items()} | {"loss": all_sum(loss) / mesh.size}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.full_tensor() if mesh.size > 1 else p.grad for name, p in trained.items()}
    if config.lora is None:
        return values | gradients
    assert all(is_adapter(name) for name in trained)
    model.merge_adapters()
    weights = {name: p.detach().full_tensor() if mesh.size > 1 else p.detach() for name, p in model.named_parameters()}
    return values | gradients | {f"merged {name}": weight for name, weight in weights.items()}


def worker(rank, cases, workers, out):
    torch.set_num_threads(1)
    # Through a file: a port would have to be free until all processes have loaded torch.
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=workers)
    for name, case in cases.items():
        result = step(case, workers)
        if rank == 0:
            torch.save(result, f"{out}/{name}.pt")
    dist.barrier()  # a rank that leaves early can abort the other
    dist.destroy_process_group()


def test_float8_on_two_workers_is_near_the_exact_step(tmp_path):
    """Scales are of what a rank holds at a time: gradients are alike within the precision of float8, and not equal."""
    base = str(tmp_path / "base")
    config_of({}, 1).model.build_model().save_checkpoint(base)
    exact = {"float8": step({}, 1), "float8, adapters": step({"base": base}, 1)}
    setting = {"float8": True, "recompute": "selective", "unit_blocks": 1, "reshard_after_forward": True}
    cases = {"float8": setting | {"rows": 2}, "float8, adapters": setting | {"base": base}}
    mp.spawn(worker, (cases, 2, str(tmp_path)), nprocs=2)
    for name, expected in exact.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert found["loss"] == pytest.approx(expected["loss"].item(), rel=5e-3)
        assert found["loss"] != expected["loss"]
        trained = [key for key in expected if key.startswith(("transformer.", "vision_backbone."))]
        a, b = (torch.cat([gradients[key].flatten() for key in trained]) for gradients in (found, expected))
        assert (a - b).norm() < 0.1 * b.norm()


@pytest.mark.parametrize(
    ("workers", "cases"), [(2, CASES | LONG), pytest.param(4, LONG | HYBRID, marks=pytest.mark.slow)], ids=["2 workers", "4 workers"]
)
def test_loss_and_gradients_are_those_of_one_process(workers, cases, tmp_path):
    if workers == 2:
        base = str(tmp_path / "base")
        config_of({}, 1).model.build_model().save_checkpoint(base)
        adapters = {"base": base}
        cases = cases | {"adapters": adapters, "adapters, a unit a block": {"unit_blocks": 1} | adapters}
    mp.spawn(worker, (cases, workers, str(tmp_path)), nprocs=workers)
    whole, adapted = step({}, 1), step(adapters, 1) if workers == 2 else None
    for name, case in cases.items():
        expected = adapted if "base" in case else whole
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            near = 1e-5 * value.abs().max().item() + 1e-12  # gradients that ought to be 0 are noise
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=near, msg=lambda m, at=f"{name}: {key}": f"{at}: {m}")


def test_units_of_a_large_model_have_two_blocks():
    with torch.device("meta"):
        model = tiny_model(n_layers=4, d_model=2560, mlp_hidden_size=2 * 9728).build_model()
        assert unit_blocks(model) == 2
        assert unit_blocks(tiny_model().build_model()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 6, "parallel": ParallelConfig(replicate=4)}, r"num_workers=6 is not a multiple of parallel.replicate"),
        (
            {"num_workers": 4, "parallel": ParallelConfig(context=2), "global_batch_size": 5},
            "global_batch_size=5 is not",
        ),
        (
            {"num_workers": 2, "parallel": ParallelConfig(context=2), "sequence_length": 66},
            "sequence_length=66 is not",
        ),
    ],
)
def test_numbers_that_do_not_divide(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("-", **changes)


def test_ranks_that_share_a_sequence_read_the_same():
    data = DataConfig.new(datasets={"random": {"path": "-"}}, pad_to_max=True)
    config = tiny_config("-", data=data, num_workers=8, parallel=ParallelConfig(context=2, replicate=2))
    assert config.parallel.shard(8) == 2
    assert dataclasses.replace(config, device_batch_size=1).micro_batches == 1
