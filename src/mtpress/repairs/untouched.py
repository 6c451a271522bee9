"""Findings that repair has nothing to go by: what was changed since it was written, and what only an engine shows."""

from mtpress.repairs.repair import Repair

DAMAGED = "a hash says that a file is damaged, not what it was: fetch or make the checkpoint again"
CAUSES = "the engine shows an effect; its cause, where `check` names one, has a repair of its own"
REPAIRS = (
    Repair("file-changed", DAMAGED),
    Repair("file-gone", DAMAGED),
    Repair("file-unrecorded", "nothing is wrong"),
    Repair("engine-refuses", CAUSES),
    Repair("engine-refuses-drafts", CAUSES),
    Repair("engine-text", CAUSES),
    Repair("engine-pictures", CAUSES),
    Repair("engine-tools", CAUSES),
    Repair("engine-acceptance", "`mtpress graft CKPT OUT --from BASE` puts the base's head in, whatever the one here is"),
    Repair("engine-acceptance-base", "`mtpress graft CKPT OUT --from BASE`, or quantize again: what quantization costs cannot be mended"),
    Repair("engine-drafts-change-text", "a fault of the engine or of a kernel, not of the checkpoint"),
    Repair("engine-logits", "what quantization costs cannot be mended: quantize again"),
    Repair("engine-base", "nothing is wrong with the checkpoint"),
)
