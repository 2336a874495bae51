"""What a training run would take of a GPU's memory, which settings fit, and how fast to expect it to be."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError
from pipelines.training.config import TrainConfig

GiB = 2**30


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs, one a worker (default: num_workers of CONFIG).")] = None,
    memory: Annotated[float, typer.Option(help="Memory of a GPU in GB.")] = 80,
) -> None:
    """Computes from the configuration alone, in seconds and without a GPU, what `molmo train` would need on each GPU.

    The numbers come from docs/scaling.md's arithmetic: a bound for sequences full of tokens and crops. Exit code 2 if nothing fits.
    """
    settings = TrainConfig.load(config, [*(overrides or []), *([f"num_workers={gpus}"] if gpus else [])])
    from pipelines.training.plan import USABLE, plan, suggestions
    from pipelines.training.travel import travel

    made = plan(settings)
    print(f"{made.parameters:,} parameters on {settings.num_workers} GPU(s) of {memory:g} GB, {settings.precision}; GiB of one GPU:")
    for name in ("weights", "gradients", "optimizer", "gathered", "language", "vision", "logits", "batch", "peak"):
        print(f"  {name:<10} {getattr(made, name) / GiB:8.1f}")
    fits = made.peak <= USABLE * memory * 1e9
    print(f"as configured it {'fits' if fits else 'does not fit'}; about {made.tokens_per_second:,.0f} tokens/s a GPU")
    if settings.num_workers > 1:
        moved = travel(settings)
        apart, beside = moved.efficiency(made.seconds)
        print(
            f"a step computes for {made.seconds:.2f} s; {sum(moved[:4]) / 1e9:.1f} GB travel to a GPU in {moved.seconds:.2f} s, so it keeps"
        )
        print(f"between {apart:.0%} (nothing meanwhile) and {beside:.0%} (all meanwhile) of that speed")
    found = suggestions(settings, int(memory * 1e9))
    if not found:
        raise ConfigError(
            f"{config}: nothing fits {memory:g} GB: use more GPUs (--gpus), parallel.context for long sequences, precision=bf16, or train "
            "less of the model (ft_llm=false, ft_vit=false)"
        )
    print("what fits, the fastest first:")
    for variant, fitting in found[:3]:
        reshard = variant.parallel.reshard_after_forward
        words = [f"device_batch_size={variant.device_batch_size}"]
        words.append(f"activation_checkpointing={variant.activation_checkpointing}")
        words += [] if reshard is None else [f"parallel.reshard_after_forward={str(reshard).lower()}"]
        print(f"  {' '.join(words)}: {fitting.peak / GiB:.1f} GiB, about {fitting.tokens_per_second:,.0f} tokens/s a GPU")


app = job(main, TrainConfig)

if __name__ == "__main__":
    app()
