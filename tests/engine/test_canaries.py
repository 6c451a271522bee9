"""The canaries' own sense of right and wrong; that the built-in model knows them is tested with the engine (test_check_engine.py)."""

import io
import json

from PIL import Image

from mtpress.engine.trial.canaries import (
    COLORS,
    GROUND,
    Canary,
    draw,
    is_right,
    picture_canaries,
    story_canaries,
    text_canaries,
    tool_canaries,
)


def test_every_kind_is_asked_more_than_once_and_in_its_own_words() -> None:
    for canaries in (text_canaries(), picture_canaries(), tool_canaries(), story_canaries()):
        assert len(canaries) >= 3
        assert len({json.dumps(c.messages) for c in canaries}) == len(canaries)


def test_an_answer_must_hold_every_word() -> None:
    canary = Canary("picture", ({"role": "user", "content": "?"},), ("circle", "red"))
    assert is_right(canary, {"content": "A Red circle."})
    assert not is_right(canary, {"content": "A blue circle."})
    assert not is_right(canary, {"content": None})


def test_a_tool_call_must_have_the_name_and_the_arguments() -> None:
    canary = tool_canaries()[0]
    assert canary.call is not None
    name, arguments = canary.call

    def message(name: str, arguments: str) -> dict[str, object]:
        return {"content": None, "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}

    assert is_right(canary, message(name, json.dumps(dict(arguments))))
    assert not is_right(canary, message("buy", json.dumps(dict(arguments))))
    assert not is_right(canary, message(name, json.dumps({"town": "Tarn!"})))
    assert not is_right(canary, message(name, "{torn"))
    assert not is_right(canary, {"content": f"{name}({arguments})", "tool_calls": None})


def test_a_picture_shows_its_shape_in_its_color() -> None:
    for shape in ("circle", "square", "triangle"):
        with Image.open(io.BytesIO(draw(shape, "red"))) as image:
            width, height = image.size
            assert image.getpixel((width // 2, height // 2)) == COLORS["red"]
            assert image.getpixel((0, 0)) == GROUND
            corner = image.getpixel((width // 5, height // 5))
            assert (corner == COLORS["red"]) == (shape == "square")


def test_requests_are_greedy_and_do_not_think() -> None:
    for canary in (*text_canaries(), *tool_canaries()):
        body = canary.body()
        assert body["temperature"] == 0.0
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert ("tools" in body) == (canary.kind == "tool")
