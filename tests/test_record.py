import json
from pathlib import Path

from mtpress.checkpoint.record import RECORD_NAME, add_to_record, record_bytes


def test_what_is_learned_later_is_added_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_bytes(record_bytes("quantize", device="cpu"))
    before = json.loads((tmp_path / RECORD_NAME).read_text())
    assert add_to_record(tmp_path, engine_check={"sound": True})
    assert add_to_record(tmp_path, engine_check={"sound": False})
    assert json.loads((tmp_path / RECORD_NAME).read_text()) == before | {"engine_check": {"sound": False}}
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_a_checkpoint_without_a_record_gets_none(tmp_path: Path) -> None:
    assert not add_to_record(tmp_path, engine_check={})
    assert list(tmp_path.iterdir()) == []


def test_a_torn_record_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text('{"stage": ')
    assert not add_to_record(tmp_path, engine_check={})
    assert (tmp_path / RECORD_NAME).read_text() == '{"stage": '
