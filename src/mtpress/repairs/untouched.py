"""Findings that repair has nothing to go by: what was changed since it was written, what the numbers show, what only an engine shows."""

from mtpress.repairs.repair import Repair

DAMAGED = "a hash says that a file is damaged, not what it was: fetch or make the checkpoint again"
CAUSES = "the engine shows an effect; its cause, where `check` names one, has a repair of its own"
AUTHOR = "a finite number is its author's: whether it is damage, only a source can say"
MEASURED = "a scale of activations is measured, no file has it: quantize again"
REPAIRS = (
    Repair("code-beside", "it is never run here; take it out if nothing needs it"),
    Repair("scale-too-small", MEASURED),
    Repair("scale-too-large", MEASURED),
    Repair("scale-large", MEASURED),
    Repair("values-not-finite", "with `--base` the finding not-finite is mended"),
    Repair("constant", AUTHOR),
    Repair("scales-constant", AUTHOR),
    Repair("rows-zero", AUTHOR),
    Repair("codes-without-scales", AUTHOR),
    Repair("magnitude", AUTHOR),
    Repair("norm-shifted", AUTHOR),
    Repair("norm-untrained", AUTHOR),
    Repair("decay-outside", AUTHOR),
    Repair("head-copied", "`mtpress graft CKPT OUT --from BASE --replace-head` puts the base's head in"),
    Repair("layers-copied", AUTHOR),
    Repair("values-not-read", "nothing is known to be wrong"),
    Repair("file-changed", DAMAGED),
    Repair("file-gone", DAMAGED),
    Repair("file-unverified", DAMAGED),
    Repair("weights-unhashed", "nothing is known to be wrong"),
    Repair("file-unrecorded", "nothing is wrong"),
    Repair("engine-refuses", CAUSES),
    Repair("engine-refuses-drafts", CAUSES),
    Repair("engine-text", CAUSES),
    Repair("engine-pictures", CAUSES),
    Repair("engine-tools", CAUSES),
    Repair("engine-acceptance", "`mtpress graft CKPT OUT --from BASE --replace-head` puts the base's head in, whatever the one here is"),
    Repair(
        "engine-acceptance-base",
        "`mtpress graft CKPT OUT --from BASE --replace-head`, or quantize again: its cost cannot be mended",
    ),
    Repair("engine-drafts-change-text", "a fault of the engine or of a kernel, not of the checkpoint"),
    Repair("engine-logits", "what quantization costs cannot be mended: quantize again"),
    Repair("engine-base", "nothing is wrong with the checkpoint"),
)
