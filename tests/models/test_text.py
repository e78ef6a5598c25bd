"""Text encoders: tokens, masks, the empty caption; UMT5 from a folder."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
import torch

from sla.models.testing import open_branches, tiny_text_config, write_tiny_umt5
from sla.models.text import (
    TextEncoder,
    TrainedTextEncoder,
    TrainedTextEncoderConfig,
    UMT5TextEncoder,
    clean_caption,
)


@pytest.fixture
def encoder() -> TrainedTextEncoder:
    torch.manual_seed(0)
    encoder = TrainedTextEncoder(tiny_text_config())
    open_branches(encoder)
    return encoder


def test_tokens_are_bytes_after_bos(encoder):
    ids, mask = encoder.tokenize(["aé", ""])
    assert ids.shape == mask.shape == (2, 24)
    assert ids[0, :4].tolist() == [encoder.BOS, *"aé".encode()]
    assert mask.sum(1).tolist() == [4, 1]
    assert (ids[~mask] == encoder.PAD).all()


def test_long_captions_are_cut_at_a_character(encoder):
    ids, mask = encoder.tokenize(["x" * 22 + "é", "y" * 500])
    assert mask.sum(1).tolist() == [23, 24]  # é is two bytes and would not fit
    assert ids[0, 1:23].tolist() == [ord("x")] * 22


def test_tokens_may_be_words():
    config = replace(tiny_text_config(), words=512, max_tokens=5)
    encoder = TrainedTextEncoder(config)
    ids, mask = encoder.tokenize(["A red ball.", "a RED pill, a ball and more", "", "\udcff é"])
    assert ids.shape == (4, 6)
    assert mask.sum(1).tolist() == [5, 6, 1, 3]
    assert (ids[:, 0] == encoder.BOS).all()
    assert (ids[~mask] == encoder.PAD).all()
    assert torch.equal(ids[0, 1:3], ids[1, 1:3])  # letter case tells nothing
    assert ids[1, 1] == ids[1, 5]  # the comma is a token too
    assert len(set(ids[0, 1:5].tolist())) == 4
    # Ids are the same in every process, which Python's own hash is not.
    assert ids[0, 2] == zlib.crc32(b"red") % 512
    assert encoder(ids, mask).isfinite().all()
    assert config.identity == "words ids=512 max_tokens=5"
    with pytest.raises(ValueError, match="words is -1"):
        replace(config, words=-1)


def test_unencodable_captions_are_no_error(encoder):
    embeddings, _ = encoder.encode(["\udcff", "\x00\U0001f600"])
    assert embeddings.isfinite().all()


def test_embedding_is_a_function_of_its_caption_alone(encoder):
    captions = ["a red ball", "", "a blue cube rolls"]
    together, mask = encoder.encode(captions)
    assert together.shape == (3, 24, 16)
    assert together.isfinite().all()
    for i, caption in enumerate(captions):
        alone, alone_mask = encoder.encode([caption])
        torch.testing.assert_close(alone[0], together[i])
        assert torch.equal(alone_mask[0], mask[i])
    assert (together[0] - together[2]).abs().max() > 0.01


def test_padding_does_not_reach_real_tokens(encoder):
    ids, mask = encoder.tokenize(["a red ball"])
    expected = encoder(ids, mask)
    assert torch.count_nonzero(expected[~mask]) == 0
    length = int(mask.sum())
    torch.testing.assert_close(encoder(ids[:, :length], mask[:, :length])[0], expected[0, :length])
    other = ids.clone()
    other[~mask] = 65
    torch.testing.assert_close(encoder(other, mask), expected)


def test_order_of_bytes_matters(encoder):
    embeddings, _ = encoder.encode(["ab", "ba"])
    assert (embeddings[0].sum(0) - embeddings[1].sum(0)).abs().max() > 1e-3


def test_all_parameters_learn(encoder):
    embeddings, mask = encoder.encode(["a caption of many bytes", ""])
    embeddings[mask].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_bad_input_is_named(encoder):
    with pytest.raises(TypeError, match="list of strings"):
        encoder.encode("one string")
    with pytest.raises(TypeError, match=r"captions\[1\] is a NoneType"):
        encoder.encode(["a", None])
    with pytest.raises(ValueError, match="L at most 24"):
        encoder(torch.zeros(1, 25, dtype=torch.int64), torch.ones(1, 25, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_heads"):
        TrainedTextEncoderConfig(text_dim=10, num_heads=3)


def test_encoders_meet_the_protocol(encoder):
    assert isinstance(encoder, TextEncoder)
    assert not isinstance(torch.nn.Linear(1, 1), TextEncoder)


# --- UMT5 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def umt5_folder(tmp_path_factory):
    """A tiny random UMT5 with a word-level tokenizer, laid out as Wan's repository."""
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("umt5")
    write_tiny_umt5(folder)
    return folder


@pytest.fixture(scope="module")
def umt5(umt5_folder):
    return UMT5TextEncoder.from_pretrained(umt5_folder, max_tokens=10, dtype=torch.float32)


def test_umt5_encodes_as_wan_pads(umt5):
    embeddings, mask = umt5.encode(["a  red\nball", "", "rolls " * 50])
    assert isinstance(umt5, TextEncoder)
    assert umt5.text_dim == 24
    assert embeddings.shape == (3, 10, 24)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [4, 1, 10]
    assert torch.count_nonzero(embeddings[~mask]) == 0
    # The padding does not reach the caption's own tokens.
    ids = torch.tensor([[3, 4, 5, 1]])
    plain = umt5.encoder(ids).last_hidden_state
    torch.testing.assert_close(embeddings[0, :4], plain[0], atol=1e-5, rtol=1e-4)


def test_umt5_is_frozen(umt5):
    umt5.train()
    assert not any(module.training for module in umt5.modules())
    assert not any(p.requires_grad for p in umt5.parameters())
    assert not umt5.encode(["a"])[0].requires_grad


def test_umt5_that_is_not_there_says_what_to_fetch(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="must hold the encoder and the tokenizer in"):
        UMT5TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hf download owner/name --include \"text_enc"):
        UMT5TextEncoder.from_pretrained("owner/name", local_files_only=True)


def test_umt5_with_missing_weights_is_refused(umt5_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(umt5_folder, tmp_path / "copy")
    path = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    dropped = next(key for key in tensors if "layer.0.SelfAttention.q" in key)
    del tensors[dropped]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fill these weights: .*SelfAttention\.q"):
        UMT5TextEncoder.from_pretrained(tmp_path / "copy", dtype=torch.float32)


def test_clean_caption():
    assert clean_caption("  a &amp;amp; b\n c ") == "a & b c"
