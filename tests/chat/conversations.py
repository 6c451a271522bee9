"""Random conversations for hypothesis: valid ones, and what a server hands back for what a model wrote."""

from typing import Any

from hypothesis import strategies as st

from mtpress.chat.cases import Continuation, Message
from mtpress.chat.messages import CONTROL_TOKENS

WORDS = (
    "So.",
    " ",
    "\n",
    "\n\n",
    "</think>",
    "<think>",
    "<tool_call>",
    "</tool_response>",
    "<|think_on|>",
    "<|think_off|>",
    "ä€😀",
    "{%",
    "'",
    "\r\n",
)
# No completion spells out a control token: rule 21 goes before rule 16 there, in words and in tokens.
free_text = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(WORDS), max_size=4).map("".join)).filter(
    lambda text: not any(token in text for token in CONTROL_TOKENS)
)
hostile_text = st.one_of(free_text, st.lists(st.sampled_from((*WORDS, *CONTROL_TOKENS, "<|im_", "end|>")), max_size=5).map("".join))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | hostile_text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
arguments = st.one_of(st.none(), st.just(""), st.dictionaries(st.text("abc", min_size=1, max_size=3), json_values, max_size=2))
calls = st.builds(
    lambda name, given: {"type": "function", "function": {"name": name, **({"arguments": given} if given != () else {})}},
    st.text("abc_", min_size=1, max_size=5),
    st.one_of(arguments, st.just(())),
)
text_parts = st.builds(lambda text: {"type": "text", "text": text}, hostile_text)
pictures = st.sampled_from(
    (
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "video", "video": "a.mp4"},
        {"image": "a.png", "text": None},
    )
)
words_only = st.one_of(st.none(), hostile_text, st.lists(text_parts, max_size=2))
contents = st.one_of(st.none(), hostile_text, st.lists(st.one_of(text_parts, pictures), max_size=3))
leading = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(("system", "developer")), words_only), max_size=2
)


@st.composite
def turns(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(("user", "assistant", "tool", "system", "developer")))
    message: dict[str, Any] = {"role": role, "content": draw(words_only if role in ("system", "developer") else contents)}
    if role == "assistant":
        for field in draw(st.sets(st.sampled_from(("reasoning", "reasoning_content")))):
            message[field] = draw(st.one_of(st.none(), hostile_text))
        message["tool_calls"] = draw(st.one_of(st.none(), st.lists(calls, max_size=2)))
    return message


conversations = st.builds(lambda first, rest: [*first, *rest], leading, st.lists(turns(), min_size=1, max_size=5))
switches = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.sampled_from((None, True, False)),
        "preserve_thinking": st.sampled_from((None, True, False)),
        "add_vision_id": st.sampled_from((None, True, False)),
        "add_generation_prompt": st.booleans(),
        "tools": st.sampled_from((None, [], [{"type": "function", "function": {"name": "look"}}])),
    },
)


@st.composite
def completions(draw: st.DrawFn, thinking: bool, hands_on: str) -> Continuation:
    """What a model writes, in the format, and what a server makes of it.

    hands_on: "raw" as vLLM's parser does, line ends and all; "stripped" as others do, where the model wrote no more than the format has.
    """
    # in instruct mode a block of its own at the beginning is taken for reasoning (15)
    visible = free_text.filter(lambda text: thinking or not (text.startswith("<think>") and "</think>" in text))
    stripped = free_text.map(str.strip).filter(lambda text: thinking or not (text.startswith("<think>") and "</think>" in text))
    called = draw(
        st.lists(
            st.builds(lambda name: {"type": "function", "function": {"name": name, "arguments": {}}}, st.text("abc", min_size=1)),
            max_size=2,
        )
    )
    text = draw(stripped if called or hands_on == "stripped" else visible)
    said = (
        text
        + ("\n\n" if text and called else "")
        + "\n".join(f"<tool_call>\n<function={call['function']['name']}>\n</function>\n</tool_call>" for call in called)
    )
    more: dict[str, Any] = {"tool_calls": called} if called else {}
    content = text
    if thinking:
        thought = draw(free_text.filter(lambda text: "</think>" not in text and text.strip()))
        gap = "\n\n"
        if hands_on == "stripped":
            thought = thought.strip()
        else:
            thought += "\n"
            gap = draw(st.sampled_from(("\n", "\n\n", "\n\n\n"))) if not called else gap
            content = gap + text if not called else text
        said = f"{thought}{'' if thought.endswith(chr(10)) else chr(10)}</think>{gap}{said}"
        more[draw(st.sampled_from(("reasoning", "reasoning_content")))] = thought
    follows = st.sampled_from(
        ([], [{"role": "user", "content": "And?"}], [{"role": "tool", "content": "Rain."}], [{"role": "system", "content": "Be."}])
    )
    return Continuation(f"{said}<|im_end|>", {"role": "assistant", "content": content, **more}, draw(follows))
