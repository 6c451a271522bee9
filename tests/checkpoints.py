"""Small Qwen3.5-class checkpoints made by hand, and a way to change one.

In: nothing, or a checkpoint directory. Out: a BF16 checkpoint of hidden size 64 with a vision tower of one block, a draft
head, a byte-level tokenizer, template and processor files; the same in other formats (SMALL_FORMATS); `Edit`, which rewrites a
directory. Leaves out: sense.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.formats import compressed_tensors, int4, mixed_precision
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.plan.recipe import Recipe, load_recipe
from mtpress.rounding.fp8 import round_group

PREFIX = "model.language_model."
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IDS = {token: 256 + i for i, token in enumerate(SPECIALS)}


def weight_only(name: str) -> Recipe:
    """A shipped recipe of NVFP4 as it is where its samples do not matter: one input_scale for all, max in place of GPTQ."""
    without_samples: dict[str, Any] = {"constant_input_scale": 0.01}
    recipe = load_recipe(name)
    if recipe.rounding == "gptq":
        without_samples |= {"rounding": "max", "gptq": None}
    return recipe.model_copy(update=without_samples)


def small_config() -> dict[str, Any]:
    """config.json of a model with three Gated DeltaNet layers and one full-attention layer."""
    text = {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "full_attention_interval": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "attn_output_gate": True, "mtp_num_hidden_layers": 1, "tie_word_embeddings": False,
        "eos_token_id": IDS["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_5", "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": 64, "num_position_embeddings": 16, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "language_model_only": False,
        "text_config": text, "vision_config": vision, "tie_word_embeddings": False, "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"], "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }  # fmt: skip


def small_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random BF16 weights under every name that the config calls for, in order of name."""
    shapes = dict(qwen3_5.body_shapes(config, PREFIX)) | qwen3_5.mtp_shapes(config) | qwen3_5.vision_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.05 * torch.randn(shapes[name], generator=generator)).to(torch.bfloat16) for name in sorted(shapes)}


def small_files() -> dict[str, str]:
    """Name → content of what stands beside weights and config."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    processor = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen3VLProcessor"}
    contents = {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]], "do_sample": True, "temperature": 0.7},
        "preprocessor_config.json": processor | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": processor | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    files = {name: json.dumps(content, indent=1) for name, content in contents.items()}
    return files | {"tokenizer.json": tokenizer.to_str(), "chat_template.jinja": template()}


def write_small(out: Path, seed: int = 0) -> Path:
    """Writes the whole BF16 checkpoint into `out`, which must not exist, and returns it."""
    out.mkdir(parents=True)
    config = small_config()
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name, content in small_files().items():
        (out / name).write_text(content)
    save_file(small_tensors(config, seed), out / "model.safetensors", metadata={"format": "pt"})
    return out


class Edit:
    """A checkpoint of one shard, loaded: change `tensors`, `config` and `hf` (hf_quant_config.json), then save().

    What is registered with later() happens after all was written, the index included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = load_file(path / "model.safetensors")
        self.config = self.read("config.json")
        self.hf = self.read("hf_quant_config.json") if (path / "hf_quant_config.json").exists() else None
        self._later: list[Callable[[], object]] = []

    def read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / name).read_text())
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(content))

    def change(self, name: str, **keys: Any) -> None:
        """Sets keys of a JSON file beside the weights."""
        self.write(name, self.read(name) | keys)

    def later(self, action: Callable[[], object]) -> None:
        self._later.append(action)

    @property
    def text(self) -> dict[str, Any]:
        inner: dict[str, Any] = self.config["text_config"]
        return inner

    @property
    def quantization(self) -> dict[str, Any]:
        inner: dict[str, Any] = self.config["quantization_config"]
        return inner

    def ignore(self, entries: list[str]) -> None:
        """Puts one ignore list into both config files."""
        self.quantization["ignore"] = entries
        if self.hf is not None:
            self.hf["quantization"]["exclude_modules"] = entries

    def without(self, dropped: Callable[[str], bool]) -> None:
        """Takes entries out of the ignore lists of both files."""
        self.ignore([entry for entry in self.quantization["ignore"] if not dropped(entry)])

    def save(self) -> None:
        save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        total = sum(t.numel() * t.element_size() for t in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(self.tensors), "model.safetensors")}
        self.write(INDEX_NAME, index)
        self.write("config.json", self.config)
        if self.hf is not None:
            self.write("hf_quant_config.json", self.hf)
        for action in self._later:
            action()


INT4_GROUP = 32  # the small widths are no multiples of 128


def quantizable(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The modules that a build quantizes: the body's linears but in_proj_a and in_proj_b."""
    parts = tuple(part for names in qwen3_5.QUANTIZABLE.values() for part in names)
    modules = (name.removesuffix(".weight") for name in tensors if name.startswith(f"{PREFIX}layers.") and name.endswith(".weight"))
    return [module for module in modules if module.endswith(parts)]


def in_int4(weight: torch.Tensor, group_size: int = INT4_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """codes uint8 [N, K] and scales fp16 [N, K/g] of a matrix, plainly rounded."""
    n, k = weight.shape
    groups = weight.float().view(n, k // group_size, group_size)
    scales = (groups.abs().amax(-1) / 7).half()
    return int4.nearest_codes((groups / scales.float().unsqueeze(-1)).view(n, k)), scales


def pack_int4(e: "Edit", *modules: str) -> None:
    """AutoRound's layout in place of some BF16 weights."""
    for module in modules:
        for suffix, tensor in int4.tensors(*in_int4(e.tensors.pop(f"{module}.weight"))).items():
            e.tensors[f"{module}.{suffix}"] = tensor


def _write_auto_round(bf16: Path, nvfp4: Path, out: Path) -> Path:
    e = Edit(Path(shutil.copytree(bf16, out)))
    pack_int4(e, *quantizable(e.tensors))
    whole = [f"{PREFIX}layers.{i}.linear_attn.in_proj_{x}" for i in range(3) for x in "ab"]
    said = int4.quantization_config(whole, f"{PREFIX}layers") | {"group_size": INT4_GROUP}
    e.config["quantization_config"] = said
    e.write("quantization_config.json", said)
    e.save()
    return out


def _write_gptq(bf16: Path, nvfp4: Path, out: Path) -> Path:
    e = Edit(Path(shutil.copytree(bf16, out)))
    pack_int4(e, *quantizable(e.tensors))
    for name in [name for name in e.tensors if name.endswith(".qweight")]:
        e.tensors[name.replace(".qweight", ".g_idx")] = torch.arange(8 * len(e.tensors[name]), dtype=torch.int32) // INT4_GROUP
    said = {"bits": 4, "group_size": INT4_GROUP, "sym": True, "desc_act": False, "lm_head": False, "checkpoint_format": "gptq"}
    e.config["quantization_config"] = {"quant_method": "gptq"} | said
    e.save()
    return out


def _write_int4_of_compressed_tensors(bf16: Path, nvfp4: Path, out: Path) -> Path:
    e = Edit(Path(shutil.copytree(bf16, out)))
    for module in quantizable(e.tensors):
        weight = e.tensors.pop(f"{module}.weight")
        codes, scales = in_int4(weight)
        e.tensors[f"{module}.weight_packed"] = int4.pack(codes).t().contiguous()
        e.tensors[f"{module}.weight_scale"] = scales.to(torch.bfloat16)
        e.tensors[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    weights = {"num_bits": 4, "type": "int", "group_size": INT4_GROUP, "strategy": "group", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": "pack-quantized"}
    e.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*", "re:^mtp.*", "re:.*in_proj_[ab]$"],
    }  # fmt: skip
    e.save()
    return out


def _write_nvfp4_of_compressed_tensors(bf16: Path, nvfp4: Path, out: Path, *, weight_only: bool = False) -> Path:
    e = Edit(Path(shutil.copytree(nvfp4, out)))
    ignore = e.quantization["ignore"]
    for name in [name for name in e.tensors if name.endswith(".weight_scale_2")]:
        module = name.removesuffix(".weight_scale_2")
        e.tensors[f"{module}.weight_packed"] = e.tensors.pop(f"{module}.weight")
        e.tensors[f"{module}.weight_global_scale"] = compressed_tensors.reciprocal(e.tensors.pop(name)).reshape(1)
        e.tensors[f"{module}.input_global_scale"] = compressed_tensors.reciprocal(e.tensors.pop(f"{module}.input_scale")).reshape(1)
        if weight_only:
            del e.tensors[f"{module}.input_global_scale"]
    e.config["quantization_config"] = compressed_tensors.quantization_config(ignore, weight_only=weight_only)
    e.hf = None
    (out / "hf_quant_config.json").unlink()
    e.save()
    return out


def _write_modelopt_mixed(bf16: Path, nvfp4: Path, out: Path) -> Path:
    """NVFP4 MLP, FP8 attention and GDN."""
    e = Edit(Path(shutil.copytree(nvfp4, out)))
    source = load_file(bf16 / "model.safetensors")
    formats = {m: "nvfp4" if ".mlp." in m else "fp8" for m in sorted(quantizable(source), key=qwen3_5.natural)}
    for module in [module for module, chosen in formats.items() if chosen == "fp8"]:
        del e.tensors[f"{module}.weight_scale_2"]
        linear = module.split(".", 4)[-1]
        start = module.removesuffix(linear)
        group = {f"{start}{part}": source[f"{start}{part}.weight"] for part in qwen3_5.SAME_INPUT.get(linear, (linear,))}
        parts = round_group({member: weight for member, weight in group.items() if member in formats})[module]
        e.tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    e.config["quantization_config"] = mixed_precision.quantization_config(e.quantization, formats)
    e.hf = mixed_precision.hf_quant_config(e.hf or {}, formats)
    e.save()
    return out


FP8_BLOCK = 32  # the small widths are no multiples of 128
FP8_MAX = 448.0


def in_fp8(e: "Edit", *modules: str, block: int | None = None) -> None:
    """FP8 in place of some BF16 weights: with a scale a row as compressed-tensors has it or, with `block`, one a block as Qwen has it."""
    for module in modules:
        weight = e.tensors[f"{module}.weight"].float()
        n, k = weight.shape
        size = (block, block) if block is not None else (1, k)
        tiles = F.pad(weight, (0, -k % size[1], 0, -n % size[0])).unflatten(0, (-1, size[0])).unflatten(-1, (-1, size[1]))
        scales = (tiles.abs().amax((1, 3)) / FP8_MAX).to(torch.bfloat16).float().clamp(min=2.0**-30)
        codes = weight / scales.repeat_interleave(size[0], 0)[:n].repeat_interleave(size[1], 1)[:, :k]
        e.tensors[f"{module}.weight"] = codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        e.tensors[f"{module}.{'weight_scale' if block is None else 'weight_scale_inv'}"] = scales.to(torch.bfloat16)


def _write_block_fp8(bf16: Path, nvfp4: Path, out: Path) -> Path:
    """As Qwen releases FP8, but for the draft layer, which is in BF16 here."""
    e = Edit(Path(shutil.copytree(bf16, out)))
    kept = [name.removesuffix(".weight") for name, t in e.tensors.items() if name.endswith(".weight") and t.ndim > 1]
    in_fp8(e, *quantizable(e.tensors), block=FP8_BLOCK)
    e.config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": [module for module in kept if module not in quantizable(e.tensors)],
    }  # fmt: skip
    e.save()
    return out


def _write_mixed_compressed_tensors(bf16: Path, nvfp4: Path, out: Path) -> Path:
    """NVFP4 MLP, attention and GDN in FP8 with a scale a row, as the most used third-party builds of the 27B are; full names."""
    e = Edit(_write_nvfp4_of_compressed_tensors(bf16, nvfp4, out))
    source = load_file(bf16 / "model.safetensors")
    mlp = [module for module in quantizable(source) if ".mlp." in module]
    rest = [module for module in quantizable(source) if ".mlp." not in module]
    for module in rest:
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            del e.tensors[f"{module}.{suffix}"]
        e.tensors[f"{module}.weight"] = source[f"{module}.weight"]
    in_fp8(e, *rest)
    groups = [compressed_tensors.nvfp4_group(mlp), compressed_tensors.fp8_group(rest, "channel")]
    e.config["quantization_config"] = compressed_tensors.grouped_config(groups, e.quantization["ignore"])
    e.save()
    return out


SMALL_FORMATS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "compressed-tensors": _write_nvfp4_of_compressed_tensors,
    "compressed-tensors-w4a16": partial(_write_nvfp4_of_compressed_tensors, weight_only=True),
    "compressed-tensors-int4": _write_int4_of_compressed_tensors,
    "auto-round": _write_auto_round,
    "gptq": _write_gptq,
    "modelopt-mixed": _write_modelopt_mixed,
    "fp8": _write_block_fp8,
    "compressed-tensors-mixed": _write_mixed_compressed_tensors,
}
