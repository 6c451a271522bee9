"""The oracle: Intel auto-round's own INT4 build of a checkpoint, the way its command makes it.

    .envs/autoround/bin/python tests/oracles/autoround_export.py SRC OUT TOKENS.json [--iters 2] [--seqlen 24] [--nsamples N]

In: a BF16 qwen3_5 checkpoint and a JSON list of token-id lists. Out: what AutoRound(scheme="W4A16") writes as format
auto_round, with its defaults but for the number of samples, their length and the iterations: the body tuned, the draft head's
layer rounded to INT4 without tuning, tokenizer and processor files written anew by transformers. Leaves out: quality, which a
few samples cannot give. Runs on the packages of locks/autoround.txt and imports nothing of mtpress.
"""

import argparse
import gc
import json
import shutil
import tempfile
from pathlib import Path

from auto_round import AutoRound
from transformers import AutoTokenizer

BATCH_SIZE = 8  # a last batch that is not full is one of wrong positions in auto-round 0.16.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--iters", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=24, help="shorter samples are dropped, longer ones cut")
    parser.add_argument("--nsamples", type=int, help="of those that are long enough; all of them unless named")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.source, local_files_only=True)
    texts = [tokenizer.decode(ids) for ids in json.loads(options.tokens.read_text(encoding="utf-8"))]
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) >= options.seqlen]  # as auto-round reads them
    nsamples = options.nsamples or len(texts) // BATCH_SIZE * BATCH_SIZE
    texts = texts if options.nsamples else texts[:nsamples]  # auto-round leaves out some by rules of its own
    gc.freeze()  # it collects garbage some twenty times, a second each with all that was imported
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.json"
        lines.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
        rounder = AutoRound(
            str(options.source), scheme="W4A16", dataset=str(lines),
            nsamples=nsamples, seqlen=options.seqlen, batch_size=BATCH_SIZE, iters=options.iters,
        )  # fmt: skip
        _, written = rounder.quantize_and_save(f"{folder}/out", format="auto_round")
        # it makes a folder of its own, named after model and scheme, inside the one it is given
        shutil.move(written[0] if isinstance(written, list) else written, options.out)


if __name__ == "__main__":
    main()
