import functools

import pytest
import torch
import yaml
from tiny_molmo import collate, example, tiny_config, tiny_model
from torch import nn

from molmo_core.checkpoint.links import clean_name
from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig, ModelBase
from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.llm import Block
from molmo_core.nn.vit import VitBlock
from molmo_core.preprocessing.tiling import Tiling
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.tokens import ImageTokenIds

# -- configuration -----------------------------------------------------------------------------------------------------


def test_load_chooses_the_class_and_unwraps_training_files(tmp_path):
    config = tiny_config()
    config.save(tmp_path / "config.yaml")
    assert BaseModelConfig.load(tmp_path / "config.yaml") == config
    assert BaseModelConfig.load(tmp_path) == config  # a checkpoint folder
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"run_name": "x", "model": yaml.safe_load((tmp_path / "config.yaml").read_text())}))
    loaded = MolmoConfig.load(tmp_path / "train.yaml", overrides=["llm.n_layers=3"])
    assert isinstance(loaded, MolmoConfig)
    assert loaded.llm.n_layers == 3
    assert BaseModelConfig.load(tmp_path / "train.yaml", key="model") == config


def test_load_errors(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model_name: molmoo\n")
    with pytest.raises(ConfigError, match="Did you mean 'molmo'"):
        BaseModelConfig.load(path)
    path.write_text("llm: {n_layers: 2}\n")
    with pytest.raises(ConfigError, match="model_name"):
        BaseModelConfig.load(path)
    assert MolmoConfig.load(path).llm.n_layers == 2  # the class itself is known
    path.write_text("model_name: molmo\npoint_cloud_backbone: {voxels: 3}\n")
    with pytest.raises(ConfigError, match="point_cloud_backbone"):
        BaseModelConfig.load(path)


def test_another_models_file_is_refused(golden):
    from molmo_core.models.video_olmo import VideoOlmoConfig

    with pytest.raises(ConfigError, match="is a MolmoConfig, not a VideoOlmoConfig"):
        VideoOlmoConfig.load(golden / "molmo-qwen2-clip" / "config.yaml")


def test_api_document_snippets():
    from molmo_core.nn.configs import LlmConfig, MolmoVisionBackboneConfig

    config = MolmoConfig.new(
        llm=LlmConfig(d_model=4096, n_heads=32, n_layers=32), vision_backbone=MolmoVisionBackboneConfig(image_model_type="openai")
    )
    with torch.device("meta"):
        model = Molmo(config)
    assert model.num_params() > 6e9


@pytest.mark.parametrize("folder", ["molmo-qwen2-clip", "he-molmo", "video-olmo/mixed-res"])
def test_model_and_tokenizer_agree_on_the_image_tokens(golden, folder):
    config = BaseModelConfig.load(golden / folder / "config.yaml")
    check_image_tokens(config.image_tokens, config.build_tokenizer())


def test_molmo2_and_its_tokenizer_agree_on_the_image_tokens(golden):
    tokenizer = Tokenizer.load(golden / "tokenizer", first_special_id=448, layout="molmo2")
    check_image_tokens(ImageTokenIds.of("molmo2", 448), tokenizer)
    assert tokenizer.frame_end_token_id == ImageTokenIds.of("molmo2", 448).frame_end


def check_image_tokens(ids: ImageTokenIds, tokenizer: Tokenizer) -> None:
    assert (ids.start, ids.end) == (tokenizer.image_start_token_id, tokenizer.image_end_token_id)
    assert (ids.patch, ids.col) == (tokenizer.image_patch_token_id, tokenizer.image_col_token_id)
    assert (ids.low, ids.low_res_start) == (tokenizer.image_low_token_id, tokenizer.low_res_image_start_token_id)
    assert (ids.frame_start, ids.frame_end) == (tokenizer.frame_start_token_id, tokenizer.frame_end_token_id)


# -- parameters --------------------------------------------------------------------------------------------------------


def test_groups():
    model = tiny_model()
    groups = model.parameter_groups()
    names = {group: {n for n, _ in named} for group, named in groups.items()}
    assert set.union(*names.values()) == {n for n, _ in model.named_parameters()}
    assert "transformer.wte.new_embedding" in names["connector"]
    assert "transformer.wte.embedding" in names["llm"]
    assert {n.split(".")[1] for n in names["connector"]} == {"image_pooling_2d", "image_projector", "wte"}
    assert sum(p.numel() for p in model.get_connector_params() + model.get_vit_params() + model.get_llm_params()) == model.num_params()
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="extra belongs to no group"):
        model.parameter_groups()


def test_meta_device_then_new_weights():
    with torch.device("meta"):
        model = Molmo(tiny_config())
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())  # nothing that to_empty could spoil
    torch.manual_seed(3)
    model.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(3)
    expected = Molmo(tiny_config())
    expected.reset_parameters()
    states = [m.state_dict() for m in (model, expected)]
    assert all(torch.isfinite(t).all() for t in states[0].values())
    torch.manual_seed(3)
    other = Molmo(tiny_config())  # construction initialises, too
    assert other.state_dict()["transformer.wte.embedding"].std() == pytest.approx(0.02, rel=0.1)


def test_dtype_and_checkpoint_names_survive_casting():
    model = tiny_model()
    names = set(model.state_dict())
    assert set(model.to(torch.bfloat16).state_dict()) == names
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- training ----------------------------------------------------------------------------------------------------------


def batch_of(model: Molmo) -> dict[str, torch.Tensor]:
    return collate([example(model.config, t, seed=i) for i, t in enumerate([[Tiling(1, 2)], [Tiling(1, 1)], []])])


def gradients(model: Molmo, **changes) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch_of(model), **changes).loss.backward()
    return {clean_name(n): p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "apply",
    ["full", "selective", *(pytest.param(a, marks=pytest.mark.slow) for a in ("compile", "compile full", "compile selective"))],
)
def test_recomputed_and_compiled_blocks_are_the_same(apply):
    model = tiny_model().train()
    expected, names = gradients(model), set(model.state_dict())
    if apply != "compile":
        model.apply_activation_checkpointing(apply.removeprefix("compile "))
    if apply.startswith("compile"):
        model.apply_compile(backend="aot_eager")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
    assert set(model.state_dict()) == names


def test_wrap_policy_names_the_blocks():
    model = tiny_model()
    policy = model.get_fsdp_wrap_policy()
    wrapped = [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=1)]
    assert len(wrapped) == 2 + 3
    assert {type(m) for m in wrapped} == {Block, VitBlock}


def test_abstract_model_says_so():
    with pytest.raises(TypeError, match="forward"):
        ModelBase(None)(torch.zeros(1, 1))


def two_processes(rank: int, results: str) -> None:
    """One rank has images, the other only text. Saves losses and gradients of FSDP1 and FSDP2."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=2)
    saved = {}
    for kind in ("fsdp1", "fsdp1-bf16", "fsdp2", "fsdp2-bf16"):
        model = tiny_model().train()
        batch = {k: v for k, v in batch_of(model).items() if k != "metadata"}
        rows = slice(0, 2) if rank == 0 else slice(2, 3)
        batch = {k: v[rows] for k, v in batch.items() if rank == 0 or k not in ("images", "pooled_patches_idx")}
        half = kind.endswith("bf16")
        if kind.startswith("fsdp1"):
            precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
            # The snippet of the API document (on the CPU, FSDP1 also wants to be told the device).
            model = FSDP(
                model, auto_wrap_policy=model.get_fsdp_wrap_policy(), mixed_precision=precision, device_id=torch.device("cpu"),
                use_orig_params=True,
            )  # fmt: skip
        else:
            model.apply_fsdp2(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None)
            model.apply_activation_checkpointing()
            tables = []
            model.transformer.blocks[0].register_forward_pre_hook(lambda module, args, tables=tables: tables.append(args[1][0].dtype))
        loss = model(**batch).loss
        loss.backward()
        saved[kind] = {"loss": loss.detach()}
        if kind.startswith("fsdp2"):
            saved[kind]["gradients"] = {clean_name(n): p.grad.full_tensor() for n, p in model.named_parameters()}
            assert tables[0] == torch.float32  # not cast to bfloat16 on the way into the block
        else:
            saved[kind]["norm"] = model.clip_grad_norm_(1e9)
    torch.save(saved, f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_fully_sharded(tmp_path):
    """Both FSDPs on two processes give the gradients of one process, also when one rank has no image."""
    import torch.multiprocessing as mp

    mp.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
    model = tiny_model().train()
    batch = batch_of(model)
    first = model(**{k: v[:2] for k, v in batch.items()}).loss
    second = model(**{k: v[2:] for k, v in batch.items() if k not in ("images", "pooled_patches_idx")}).loss
    ((first + second) / 2).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected.values()]))
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    for rank, loss in enumerate((first, second)):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind, result in saved.items():
            half = kind.endswith("bf16")
            torch.testing.assert_close(result["loss"], loss.detach(), rtol=0.05 if half else 1e-4, atol=0)
            if "norm" in result:
                torch.testing.assert_close(result["norm"], norm, rtol=0.1 if half else 1e-4, atol=0)
            elif not half:
                assert set(result["gradients"]) == set(expected)
                for name, gradient in result["gradients"].items():
                    close(gradient, expected[name])
