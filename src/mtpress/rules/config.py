"""Rules on config.json: the class and sizes that the engine builds the model from."""

import re
from collections.abc import Iterator

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.engine import ARCHITECTURE
from mtpress.models.qwen3_5.names import rope_parameters
from mtpress.quant_config.view import CONFIG, Subject
from mtpress.rules.rule import Problem, Rule

TEXT_MODEL_TYPE = "qwen3_5_text"
OTHER_TASKS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|RewardModel|ForEmbedding|ValueHead")
OTHER_HEADS = re.compile(r"^(?:.*\.)?(score|classifier|v_head|value_head|reward_head)\.")
ADAPTER = re.compile(r"[._](lora_(?!scal)\w+|lokr_\w+|hada_\w+|ia3_l|b?oft_\w+|vera_\w+|adapters?)(\.|$)")
BITSANDBYTES = re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+|SCB)$")


def not_treated(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is none that mtpress treats, in one sentence: a classifier, an adapter that is not merged, bitsandbytes."""
    said = checkpoint.config.get("architectures")
    named = next((name for name in said if isinstance(name, str) and OTHER_TASKS.search(name)), None) if isinstance(said, list) else None
    head = next((name for name in checkpoint.tensors if OTHER_HEADS.match(name)), None)
    if named is not None or head is not None:
        return f"is a model with another head than a language model's ({named or head}), which mtpress does not know"
    if (name := next(filter(ADAPTER.search, checkpoint.tensors), None)) is not None:
        return f"holds an adapter that is not merged ({name}): merge it into the model first"
    quantization = checkpoint.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "bitsandbytes" or any(map(BITSANDBYTES.search, checkpoint.tensors)):
        return "is quantized by bitsandbytes, which mtpress does not know: dequantize it with transformers (model.dequantize()) first"
    return None


def config_incomplete(subject: Subject) -> Iterator[Problem]:
    if subject.config_problem is not None:
        yield Problem(subject.config_problem, (CONFIG,))


def architecture(subject: Subject) -> Iterator[Problem]:
    said, right = subject.config.get("architectures"), ARCHITECTURE[subject.checkpoint.model_type]
    if said != [right]:
        model_type = subject.checkpoint.model_type
        yield Problem(f"config.json: architectures is {str(said)[:80]}, with model_type {model_type} it must be [{right!r}]", (CONFIG,))


def text_model_type(subject: Subject) -> Iterator[Problem]:
    inner = subject.config.get("text_config")
    said = inner.get("model_type", TEXT_MODEL_TYPE) if isinstance(inner, dict) else TEXT_MODEL_TYPE
    if said != TEXT_MODEL_TYPE:
        yield Problem(f"config.json: text_config.model_type is {str(said)[:60]!r}, vLLM knows {TEXT_MODEL_TYPE!r}", (CONFIG,))


def dtype(subject: Subject) -> Iterator[Problem]:
    said = [level.get(key) for level in (subject.config, subject.model.text_config(subject.config)) for key in ("dtype", "torch_dtype")]
    first = next((value for value in said if value is not None), None)
    if first != "bfloat16":
        yield Problem(f"config.json: dtype is {str(first)[:40]}, the model computes in bfloat16", (CONFIG,))


def torch_dtype(subject: Subject) -> Iterator[Problem]:
    text = subject.model.text_config(subject.config)
    if "torch_dtype" in subject.config or "torch_dtype" in text:
        yield Problem("config.json: holds torch_dtype, which is called dtype since transformers 5", (CONFIG,))


def rope_yarn(subject: Subject) -> Iterator[Problem]:
    rope = rope_parameters(subject.model.text_config(subject.config))
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn" and "mrope_section" in rope:
        yield Problem(f"config.json: rope_type yarn, factor {str(rope.get('factor'))[:20]}", (CONFIG,))


RULES = (
    Rule(
        "config-incomplete",
        "error",
        "config.json lacks a size, so it cannot be said which tensors the checkpoint must hold; the engine stops on it or guesses.",
        "restore config.json from the source checkpoint: mtpress repair CKPT OUT --base SRC",
        config_incomplete,
    ),
    Rule(
        "architecture",
        "error",
        "`architectures` does not name the class of the model_type: the engine builds another model, or none.",
        "set it in config.json, or: mtpress repair CKPT OUT --base SRC",
        architecture,
    ),
    Rule(
        "text-model-type",
        "error",
        "text_config.model_type is not the one vLLM builds its decoder layers for (ValueError: Invalid model_type).",
        "restore config.json from the source checkpoint: mtpress repair CKPT OUT --base SRC",
        text_model_type,
    ),
    Rule(
        "dtype",
        "warning",
        "The declared dtype is missing or not bfloat16: the engine computes in another precision than the model was trained in.",
        'set "dtype": "bfloat16" in config.json, or: mtpress repair CKPT OUT --base SRC',
        dtype,
    ),
    Rule(
        "rope-yarn",
        "note",
        "YaRN beside M-RoPE: vLLM 0.32 takes the range that it corrects from four times original_max_position_embeddings, transformers "
        "from that itself. Calibration and eval compute as transformers does, and so a little otherwise than vLLM.",
        "leave YaRN out where no text is longer than original_max_position_embeddings",
        rope_yarn,
    ),
    Rule(
        "torch-dtype",
        "note",
        "config.json carries the old key torch_dtype; every engine still reads it.",
        "nothing needs to be done; mtpress repair renames it",
        torch_dtype,
    ),
)
