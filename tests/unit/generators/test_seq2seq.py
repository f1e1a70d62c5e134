import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from rag_lightning.errors import CheckpointError, ConfigError, DataError, MissingFileError
from rag_lightning.generators.base import Generator
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.types import TokenBatch

VOCAB_SIZE = 23
FAMILIES = ("bart", "t5", "bert_pair")
EXACT = {"atol": 1e-10, "rtol": 0.0}


def bert_config(hidden_size=16, **changes):
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **changes,
    )


def hf_model(family, dtype=torch.float64, *, seed=0, init_std=0.5):
    """A random model in evaluation mode: BART and T5 with a start token of their own, the pair with [CLS] and [SEP]."""
    torch.manual_seed(seed)
    if family == "bart":
        config = BartConfig(
            vocab_size=VOCAB_SIZE,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=32,
            init_std=init_std,
        )
    elif family == "t5":
        config = T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    else:  # of two widths, so that the projection between them takes part
        config = EncoderDecoderConfig.from_encoder_decoder_configs(bert_config(16), bert_config(8))
        config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 2, 3
        return EncoderDecoderModel(config).eval().to(dtype)
    return AutoModelForSeq2SeqLM.from_config(config).eval().to(dtype)


@pytest.fixture(params=FAMILIES)
def generator(request):
    return Seq2SeqGenerator(model=hf_model(request.param))


def random_contexts(generator, num_contexts, length=6, seed=1):
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (num_contexts, 1), generator=rng)).long()
    ids = torch.randint(4, VOCAB_SIZE, (num_contexts, length), generator=rng)
    return TokenBatch(ids.masked_fill(mask == 0, generator.pad_token_id), mask)


def random_labels(generator, lengths, seed=2):
    """Start token, ``length`` scored tokens of which the last is the end token, padding."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.full((len(lengths), 1 + max(lengths)), generator.pad_token_id)
    for row, length in enumerate(lengths):
        labels[row, 0] = generator.start_token_id
        labels[row, 1:length] = torch.randint(4, VOCAB_SIZE, (length - 1,), generator=rng)
        labels[row, length] = generator.eos_token_id
    return labels


def hf_log_probs(generator, contexts, decoder_ids):
    """log p of every next token by the model's own forward, without a cache: the oracle, [N, T, V]."""
    logits = generator.model(
        input_ids=contexts.input_ids, attention_mask=contexts.attention_mask, decoder_input_ids=decoder_ids
    ).logits
    return logits.log_softmax(dim=-1)


# ---------------------------------------------------------------------- scoring


def test_it_is_a_generator(generator):
    assert isinstance(generator, Generator)


def test_score_equals_log_softmax_and_gather_on_the_models_own_forward(generator):
    lengths, num_passages = [4, 1, 3], 2
    contexts = random_contexts(generator, 6)
    labels = random_labels(generator, lengths)
    output = generator.score(generator.encode(contexts), labels, num_passages, vocab_mean=True, keep_logits=True)
    log_probs = hf_log_probs(generator, contexts, labels[:, :-1].repeat_interleave(num_passages, dim=0))
    assert output.token_log_probs_BKT.shape == (3, 2, 4)
    for row, length in enumerate(lengths):
        assert output.target_mask_BT[row].tolist() == [place < length for place in range(4)]
        for passage in range(num_passages):
            for place in range(4):
                found = output.token_log_probs_BKT[row, passage, place]
                expected_V = log_probs[row * num_passages + passage, place]
                if place >= length:
                    assert found == 0
                    continue
                torch.testing.assert_close(found, expected_V[labels[row, place + 1]], **EXACT)
                torch.testing.assert_close(output.vocab_mean_BKT[row, passage, place], expected_V.mean(), **EXACT)
                kept_V = output.logits_BKTV[row, passage, place].log_softmax(dim=-1)
                torch.testing.assert_close(kept_V, expected_V, **EXACT)


def test_nothing_with_a_vocabulary_axis_is_kept_unasked(generator):
    output = generator.score(generator.encode(random_contexts(generator, 2)), random_labels(generator, [2, 3]), 1)
    assert output.vocab_mean_BKT is None
    assert output.logits_BKTV is None


def test_padding_of_contexts_and_targets_changes_nothing(generator):
    contexts, labels = random_contexts(generator, 4), random_labels(generator, [2, 3])
    found = generator.score(generator.encode(contexts), labels, 2).token_log_probs_BKT
    pad = generator.pad_token_id
    wider = TokenBatch(
        torch.nn.functional.pad(contexts.input_ids, (0, 3), value=pad),
        torch.nn.functional.pad(contexts.attention_mask, (0, 3)),
    )
    wider_labels = torch.nn.functional.pad(labels, (0, 2), value=pad)
    padded = generator.score(generator.encode(wider), wider_labels, 2).token_log_probs_BKT
    torch.testing.assert_close(padded[:, :, :3], found, **EXACT)
    assert (padded[:, :, 3:] == 0).all()


def test_gradient_of_the_score_reaches_every_weight(generator):
    """A pair of BERTs once kept its encoder's pooler, which stalls distributed training."""
    generator.train()
    output = generator.score(generator.encode(random_contexts(generator, 4)), random_labels(generator, [3, 4]), 2)
    output.token_log_probs_BKT.sum().backward()
    without = [name for name, weight in generator.named_parameters() if weight.grad is None]
    assert without == []


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_normalised_in_float32(family):
    generator = Seq2SeqGenerator(model=hf_model(family, torch.bfloat16))
    contexts, labels = random_contexts(generator, 2), random_labels(generator, [2, 3])
    encoded = generator.encode(contexts)
    output = generator.score(encoded, labels, 1, vocab_mean=True)
    assert output.token_log_probs_BKT.dtype == output.vocab_mean_BKT.dtype == torch.float32
    log_probs, _ = generator.step(labels[:, 0], generator.start(encoded))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(2), atol=1e-5, rtol=0)


def test_another_number_of_contexts_than_targets_times_passages_is_refused(generator):
    encoded = generator.encode(random_contexts(generator, 5))
    with pytest.raises(ConfigError, match="expected 2 targets x 3 passages = 6 contexts, got 5: num_passages must be"):
        generator.score(encoded, random_labels(generator, [2, 2]), 3)


# ---------------------------------------------------------------------- step by step


@torch.no_grad()
def test_cached_steps_equal_the_score(generator):
    contexts, labels = random_contexts(generator, 3), random_labels(generator, [4, 4, 4])
    encoded = generator.encode(contexts)
    scored = generator.score(encoded, labels, 1).token_log_probs_BKT[:, 0]
    expected = hf_log_probs(generator, contexts, labels[:, :-1])
    state = generator.start(encoded)
    for place in range(4):
        log_probs, state = generator.step(labels[:, place], state)
        torch.testing.assert_close(log_probs, expected[:, place], **EXACT)
        chosen = log_probs.gather(1, labels[:, place + 1, None])[:, 0]
        torch.testing.assert_close(chosen, scored[:, place], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("before", [0, 2])
def test_reordered_rows_go_on_as_if_they_had_been_there_from_the_start(generator, rows, before):
    contexts, labels = random_contexts(generator, 3), random_labels(generator, [5, 5, 5])
    state = generator.start(generator.encode(contexts))
    for place in range(before):
        _, state = generator.step(labels[:, place], state)
    state = generator.reorder(state, torch.tensor(rows))
    chosen = TokenBatch(contexts.input_ids[rows], contexts.attention_mask[rows])
    continued = labels[rows].clone()
    continued[:, before + 1] = 4 + torch.arange(len(rows))  # equal rows part here
    expected = hf_log_probs(generator, chosen, continued[:, :-1])
    for place in range(before, 4):
        log_probs, state = generator.step(continued[:, place], state)
        torch.testing.assert_close(log_probs, expected[:, place], **EXACT)


# ---------------------------------------------------------------------- where models come from


def word_tokenizer(directory, num_tokens=VOCAB_SIZE):
    """``[CLS] … [SEP]`` around words ``w5 w6 …``."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, num_tokens))]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def test_two_encoders_are_joined_with_the_tokenizers_special_tokens(tmp_path):
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    word_tokenizer(tmp_path / "bert")
    generator = Seq2SeqGenerator.from_encoders(encoder=str(tmp_path / "bert"), decoder=str(tmp_path / "bert"))
    assert (generator.pad_token_id, generator.start_token_id, generator.eos_token_id) == (0, 2, 3)
    assert generator.model.config.decoder.add_cross_attention
    assert generator.model.config.decoder.is_decoder
    pretrained = BertModel.from_pretrained(tmp_path / "bert").embeddings.word_embeddings.weight
    assert torch.equal(generator.model.encoder.embeddings.word_embeddings.weight, pretrained)
    assert torch.equal(generator.model.decoder.bert.embeddings.word_embeddings.weight, pretrained)
    generator.eval()
    generator.save(tmp_path / "saved")
    again = Seq2SeqGenerator.load(tmp_path / "saved")
    contexts, labels = random_contexts(generator, 2), random_labels(generator, [2, 3])
    found, expected = (each.score(each.encode(contexts), labels, 1).token_log_probs_BKT for each in (again, generator))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_generator_comes_back_with_and_without_its_tokenizer(family, tmp_path):
    model = hf_model(family, torch.float32)
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    for name, own in (("with", tokenizer), ("without", None)):
        generator = Seq2SeqGenerator(model=model, tokenizer=own)
        generator.save(tmp_path / name)
        again = Seq2SeqGenerator.load(tmp_path / name)
        assert (again.tokenizer is None) == (own is None)
        contexts, labels = random_contexts(generator, 2), random_labels(generator, [2, 3])
        found = again.score(again.encode(contexts), labels, 1).token_log_probs_BKT
        assert torch.equal(found, generator.score(generator.encode(contexts), labels, 1).token_log_probs_BKT)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_tokenizer_may_lie_elsewhere(tmp_path):
    hf_model("bart", torch.float32).save_pretrained(tmp_path / "model")
    word_tokenizer(tmp_path / "tokenizer")
    generator = Seq2SeqGenerator.from_source(str(tmp_path / "model"), tokenizer=str(tmp_path / "tokenizer"))
    assert len(generator.tokenizer) == VOCAB_SIZE


def test_a_random_model_takes_vocabulary_and_special_tokens_from_the_tokenizer(tiny_world):
    settings = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    generator = Seq2SeqGenerator.from_config(model_type="bart", settings=settings, tokenizer=str(tiny_world.tokenizer))
    tokenizer = generator.tokenizer
    assert generator.vocab_size == len(tokenizer)
    assert generator.pad_token_id == tokenizer.pad_token_id == 0
    assert generator.start_token_id == tokenizer.bos_token_id == 1
    assert generator.eos_token_id == tokenizer.eos_token_id == 2
    assert generator.model.config.forced_eos_token_id is None


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    tokenizer = word_tokenizer(tmp_path, num_tokens=VOCAB_SIZE + 1)
    with pytest.raises(CheckpointError, match=r"the tokenizer has 24 tokens but the generator's output layer only 23"):
        Seq2SeqGenerator(model=hf_model("bart"), tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["pad_token_id", "decoder_start_token_id", "eos_token_id"])
def test_a_config_without_a_special_token_is_refused(name):
    model = hf_model("t5")
    setattr(model.config, name, None)
    with pytest.raises(ConfigError, match=f"the generator's config has no {name}"):
        Seq2SeqGenerator(model=model)


def test_padding_that_is_the_end_token_is_refused():
    model = hf_model("t5")
    model.config.pad_token_id = model.config.eos_token_id
    with pytest.raises(ConfigError, match="padding and end token are both 1: the end of an answer"):
        Seq2SeqGenerator(model=model)


def test_missing_folders_and_tokenizers_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=f"no such folder: {tmp_path / 'nowhere'}"):
        Seq2SeqGenerator.from_source(str(tmp_path / "nowhere"))
    hf_model("bart", torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"expected tokenizer files .* found none: the \w+ knows no words"):
        Seq2SeqGenerator.from_source(str(tmp_path / "model"))


# ---------------------------------------------------------------------- what the decoder attends to


def cross_value_layers(generator):
    names = {"bart": "encoder_attn.v_proj", "t5": "EncDecAttention.v", "bert": "crossattention.self.value"}
    found = [module for name, module in generator.model.named_modules() if name.endswith(tuple(names.values()))]
    return found[-2:]  # a BERT pair's encoder may carry idle ones


def test_attention_is_that_of_a_loop_over_layers_heads_and_tokens(generator):
    contexts = random_contexts(generator, 3)
    labels = torch.tensor([[generator.start_token_id, 7, 8, 9], [generator.start_token_id, 5, 6, 4], [0, 4, 4, 5]])
    labels[:, 0] = generator.start_token_id
    labels[1, 3:] = generator.pad_token_id
    encoded = generator.encode(contexts)
    usual = generator.model.config._attn_implementation
    found_BL = generator.attention(encoded, labels)
    assert generator.model.config._attn_implementation == usual
    assert not found_BL.requires_grad
    states = encoded.hidden_NLH
    if getattr(generator.model, "enc_to_dec_proj", None) is not None:
        states = generator.model.enc_to_dec_proj(states)
    values = [layer(states).detach() for layer in cross_value_layers(generator)]
    generator.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = generator.model(
            encoder_outputs=(encoded.hidden_NLH,),
            attention_mask=encoded.attention_mask_NL,
            decoder_input_ids=labels[:, :-1],
            output_attentions=True,
        )
    for row in range(3):
        scored = [t for t in range(3) if labels[row, t + 1] != generator.pad_token_id]
        for token in range(contexts.input_ids.shape[1]):
            terms = []
            for weights, value in zip(output.cross_attentions, values, strict=True):
                for head, part in enumerate(value[row, token].chunk(weights.shape[1])):
                    terms += [float(weights[row, head, t, token] * part.norm()) for t in scored]
            assert float(found_BL[row, token]) == pytest.approx(sum(terms) / len(terms), rel=1e-5, abs=1e-9)
    assert (found_BL[contexts.attention_mask == 0] == 0).all()


def test_a_decoder_that_does_not_show_its_attention_is_refused(monkeypatch):
    generator = Seq2SeqGenerator(model=hf_model("bart"))
    encoded = generator.encode(random_contexts(generator, 1))
    monkeypatch.setattr("rag_lightning.generators.seq2seq._CROSS_VALUES", ("another.name",))
    with pytest.raises(ConfigError, match="expected BartForConditionalGeneration to show .* 2 layers of weights and 0"):
        generator.attention(encoded, torch.tensor([[2, 5, 3]]))
    monkeypatch.undo()
    monkeypatch.setattr(generator.model, "set_attn_implementation", lambda name: None)
    with pytest.raises(ConfigError, match="came 0 layers of weights and 2 of values. Use a BART, T5 or BERT decoder"):
        generator.attention(encoded, torch.tensor([[2, 5, 3]]))
