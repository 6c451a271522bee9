"""What is said where a body computes no numbers: where that starts.

In: the body, and the first layer behind which a state is NaN or infinite (None: what follows the layers). Out: a `FindingError` that names
the tensors there that hold such numbers. Leaves out: finding the layer (layers.py).
"""

from dataclasses import replace

from mtpress.errors import FindingError
from mtpress.evaluation.bodies import Body
from mtpress.quant_config.view import Subject
from mtpress.values.survey import survey

SHOWN = 3


def no_number(body: Body, layer: int | None) -> FindingError:
    """layer 0 answers for the embeddings, which are in front of it, and for the vision tower."""
    checkpoint, of = body.checkpoint, body.model.layer_index
    around = ("embeddings", "vision") if layer == 0 else ("norms", "lm_head")

    def concerned(name: str) -> bool:
        part = body.model.component(name)
        return of(name) == layer if of(name) is not None else part in around and (layer in (0, None))

    near = {name: info for name, info in checkpoint.tensors.items() if concerned(name)}
    found = survey(Subject(replace(checkpoint, tensors=near)), silent=True).statistics
    bad = [name for name, statistics in found.items() if statistics.not_finite or statistics.bad_scales]
    where = "the final norm and lm_head give" if layer is None else f"layer {layer} gives"
    more = ", …" if len(bad) > SHOWN else ""
    why = f"stored so in {', '.join(bad[:SHOWN])}{more}" if bad else "none is stored so there: something overflows"
    return FindingError(f"{checkpoint.path}: {where} NaN or infinite values, {why}; mtpress check CKPT --values looks at all of it")
