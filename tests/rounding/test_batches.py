from mtpress.rounding import batches as tuning_batches
from mtpress.rounding.batches import batches, kept_bytes, piece_tokens, pieces


def test_batches_go_through_all_samples_before_one_comes_again():
    drawn = batches(7, 3, "a")
    first, second, third = next(drawn), next(drawn), next(drawn)
    assert len({*first, *second}) == 6
    assert len(set(third)) == 3
    assert next(batches(7, 3, "a")) == first
    assert sorted(next(batches(2, 8, 0))) == [0, 1]


def test_pieces_are_filled_up_and_kept_below_the_limit():
    lengths = [10, 40, 12, 100, 38]
    assert pieces(lengths, [0, 1, 2, 3, 4], 1000) == [[3, 1, 4, 2, 0]]
    assert pieces(lengths, [0, 1, 2, 3, 4], 90) == [[3], [1, 4], [2, 0]]
    assert pieces(lengths, [2], 1) == [[2]]


def test_a_wider_layer_has_room_for_fewer_tokens(monkeypatch):
    d = {
        "hidden_size": 5120, "intermediate_size": 17408, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_num_value_heads": 48, "linear_value_head_dim": 128, "num_attention_heads": 24, "head_dim": 256,
    }  # fmt: skip
    assert 300_000 < kept_bytes(d) < 900_000
    assert piece_tokens(d) > 2 * piece_tokens({**d, "intermediate_size": 4 * 17408, "hidden_size": 2 * 5120})
    monkeypatch.setattr(tuning_batches, "PIECE_BYTES", 7 * kept_bytes(d))
    assert piece_tokens(d) == 7
