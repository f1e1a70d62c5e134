import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.rag_sequence import decode_rag_sequence
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import Generator
from rag_lightning.generators.causal import CausalGenerator
from rag_lightning.generators.lora import LoraSettings, add_lora
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import chat_affixes, continuation_ids
from rag_lightning.training.objectives import LeaveOneOut, MarginalObjective, PerplexityDistillation, Sources
from rag_lightning.types import RagBatch, TokenBatch

VOCAB_SIZE = 19
FAMILIES = ("llama", "gpt2", "qwen2", "opt", "gpt_neox", "bloom")
CLOSE = {"atol": 1e-5, "rtol": 0.0}  # float32: bloom's attention is not a number in float64 where padding is masked
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hf_model(family, dtype=torch.float32):
    """A random model: rotary positions (llama, qwen2, gpt_neox), learned ones (gpt2, opt), linear biases (bloom)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB_SIZE}
    own = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "opt": {**sizes, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    }.get(family, {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 32})
    config = AutoConfig.for_model(family, **special, **own)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0) if weight.ndim > 1 else None  # far enough from uniform to tell tokens apart
    return model


@pytest.fixture(params=FAMILIES)
def generator(request):
    return CausalGenerator(model=hf_model(request.param))


def random_contexts(num_contexts, length=6, seed=1):
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (num_contexts, 1), generator=rng)).long()
    ids = torch.randint(3, VOCAB_SIZE, (num_contexts, length), generator=rng)
    return TokenBatch(ids.masked_fill(mask == 0, 0), mask)


def labels_of(*answers):
    labels = torch.zeros(len(answers), 2 + max(map(len, answers)), dtype=torch.long)
    for row, answer in enumerate(answers):
        labels[row, : len(answer) + 2] = torch.tensor([1, *answer, 2])
    return labels


def naive_log_probs(generator, context_ids, answer):
    """Each answer token's log-probability, one text at a time without padding or cache: the oracle."""
    text = [*context_ids, *answer]
    log_probs = generator.model(input_ids=torch.tensor([text])).logits[0].log_softmax(dim=-1)
    return [log_probs[len(context_ids) - 1 + place, token] for place, token in enumerate(answer)]


def real(contexts, row):
    return contexts.input_ids[row][contexts.attention_mask[row].bool()].tolist()


# ---------------------------------------------------------------------- scoring


def test_it_is_a_generator(generator):
    assert isinstance(generator, Generator)


def test_score_equals_the_models_own_forward_on_each_text_alone(generator):
    contexts, num_passages = random_contexts(6), 2
    answers = ([5, 6, 7], [8], [])
    output = generator.score(generator.encode(contexts), labels_of(*answers), num_passages)
    for row, answer in enumerate(answers):
        for passage in range(num_passages):
            expected = naive_log_probs(generator, real(contexts, row * num_passages + passage), [*answer, 2])
            found = output.token_log_probs_BKT[row, passage]
            torch.testing.assert_close(found[: len(expected)], torch.stack(expected), **CLOSE)
            assert (found[len(expected) :] == 0).all()
        assert output.target_mask_BT[row].sum() == len(answer) + 1


def test_wider_padding_changes_nothing(generator):
    contexts, labels = random_contexts(2), labels_of([5, 6], [7])
    wider = TokenBatch(*(torch.nn.functional.pad(x, (0, 3)) for x in (contexts.input_ids, contexts.attention_mask)))
    left = TokenBatch(*(torch.nn.functional.pad(x, (3, 0)) for x in (contexts.input_ids, contexts.attention_mask)))
    expected = generator.score(generator.encode(contexts), labels, 1).token_log_probs_BKT
    for padded in (wider, left):
        found = generator.score(generator.encode(padded), labels, 1).token_log_probs_BKT
        torch.testing.assert_close(found, expected, **CLOSE)


def test_steps_give_what_score_gives(generator):
    contexts, labels = random_contexts(3), labels_of([5, 6], [7, 8], [9, 10])
    encoded = generator.encode(contexts)
    expected = generator.score(encoded, labels, 1).token_log_probs_BKT[:, 0]
    state = generator.start(encoded)
    for place in range(3):
        log_probs, state = generator.step(labels[:, place], state)
        torch.testing.assert_close(
            log_probs.gather(1, labels[:, place + 1 : place + 2])[:, 0], expected[:, place], **CLOSE
        )


def test_known_tokens_are_scored_as_steps_score_them_and_a_copy_goes_its_own_way(generator):
    """Several known tokens after one row, none after another; what uses up the copy leaves the first as it was."""
    state = generator.start(generator.encode(random_contexts(3)))
    rows, known = torch.tensor([2, 0, 2]), torch.tensor([5, generator.pad_token_id, 7])
    for tokens in torch.tensor([[1, 1, 1], [5, 9, 6], [4, 4, 8]]):
        found, copy = generator.score_step(tokens, generator.fork(state), rows, known)
        generator.reorder(copy, torch.tensor([1, 1]))
        log_probs, state = generator.step(tokens, state)
        torch.testing.assert_close(found, log_probs[rows, known], **CLOSE)


def test_reorder_repeats_and_drops_rows_before_and_after_a_step(generator):
    contexts = random_contexts(2)
    rows = torch.tensor([1, 1, 0])
    chosen = TokenBatch(contexts.input_ids[rows], contexts.attention_mask[rows])
    expected = generator.start(generator.encode(chosen))
    found = generator.reorder(generator.start(generator.encode(contexts)), rows)
    tokens = torch.tensor([1, 1, 1])
    for _ in range(3):
        (log_probs, found), (wanted, expected) = generator.step(tokens, found), generator.step(tokens, expected)
        torch.testing.assert_close(log_probs, wanted, **CLOSE)
        tokens = torch.tensor([5, 9, 5])
    found, expected = generator.reorder(found, torch.tensor([2])), generator.reorder(expected, torch.tensor([2]))
    tokens = torch.tensor([4])
    torch.testing.assert_close(generator.step(tokens, found)[0], generator.step(tokens, expected)[0], **CLOSE)


def test_gradient_reaches_every_weight(generator):
    generator.score(
        generator.encode(random_contexts(2)), labels_of([5, 6], [7]), 1
    ).token_log_probs_BKT.sum().backward()
    assert [name for name, weight in generator.named_parameters() if weight.grad is None] == []


def test_inputs_longer_than_the_positions_are_refused():
    generator = CausalGenerator(model=hf_model("llama"))
    with pytest.raises(ConfigError, match="32 positions, came 33 tokens: lower model.prompt.max_tokens"):
        generator.score(
            generator.encode(TokenBatch(torch.ones(1, 32).long(), torch.ones(1, 32).long())), labels_of([5]), 1
        )


# ---------------------------------------------------------------------- marginals and decoding


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])
def test_marginals_equal_the_sums_written_out(kind):
    generator = CausalGenerator(model=hf_model("llama"))
    model = RagModel(encoder=None, generator=generator, settings=RagSettings(num_passages=2))
    contexts, scores = random_contexts(4), torch.tensor([[1.0, 2.0], [0.5, -0.5]], dtype=torch.float64)
    answers = ([5, 6], [7])
    found = model.marginal(RagBatch(contexts, scores, labels_of(*answers)), objective=kind).log_likelihood_B
    for row, answer in enumerate(answers):
        each = [naive_log_probs(generator, real(contexts, 2 * row + k), [*answer, 2]) for k in range(2)]
        prior = scores[row].softmax(0)
        if kind == "rag_sequence":
            expected = sum(prior[k] * sum(each[k]).exp() for k in range(2)).log()
        else:
            expected = sum(sum(prior[k] * each[k][t].exp() for k in range(2)).log() for t in range(len(answer) + 1))
        torch.testing.assert_close(found[row], expected, **CLOSE)


@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_thorough"])
def test_a_wide_beam_finds_what_enumeration_finds(mode):
    generator = CausalGenerator(model=hf_model("gpt2"))
    contexts, prior = random_contexts(2), torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    options = DecodingOptions(num_beams=400, max_new_tokens=2, length_penalty=0.0)
    if mode == "rag_token":
        decoded = decode_rag_token(generator, generator.encode(contexts), prior, options)
    else:
        decoded = decode_rag_sequence(generator, generator.encode(contexts), prior, options, thorough=True)
    tokens = [token for token in range(VOCAB_SIZE) if token not in (0, 2)]
    answers = [[2], *([a, b] for a, b in itertools.product(tokens, range(1, VOCAB_SIZE)))]
    best = -float("inf")
    for answer in answers:
        each = [naive_log_probs(generator, real(contexts, k), answer) for k in range(2)]
        if mode == "rag_token":
            value = sum(sum(prior[0, k].exp() * each[k][t].exp() for k in range(2)).log() for t in range(len(answer)))
        else:
            value = sum(prior[0, k].exp() * sum(each[k]).exp() for k in range(2)).log()
        if value > best:
            best, winner = value, answer
    assert [token for token in decoded.sequences_BT[0, 1:].tolist() if token != 0] == winner
    torch.testing.assert_close(decoded.log_likelihood_B[0].double(), best, atol=1e-6, rtol=0)


def test_fusion_in_decoder_is_refused():
    with pytest.raises(ConfigError, match="fid: expected an encoder-decoder.*objective=prompt_stuffing"):
        RagModel(
            encoder=None, generator=CausalGenerator(model=hf_model("llama")), settings=RagSettings(objective="fid")
        )
    generator = CausalGenerator(model=hf_model("llama"))
    encoded = generator.encode(random_contexts(1))
    with pytest.raises(ConfigError, match="attention distillation: expected an encoder-decoder"):
        generator.attention(encoded, labels_of([5]))


# ---------------------------------------------------------------------- tokenizers


def byte_tokenizer(pad=None, chat=False, bos=False):
    """Byte-level, so that a word brings its space, as GPT-2's and Llama 3's; without padding unless asked."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|bos|>", "<|im_start|>", "<|im_end|>", *([pad] if pad else [])]
    vocabulary = {token: number for number, token in enumerate([*specials, *sorted(alphabet), "ĠP", "Pa", "ĠPa"])}
    merges = [("Ġ", "P"), ("P", "a"), ("ĠP", "a")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", **({"pad_token": pad} if pad else {})
    )
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def llama_for(tokenizer, **arguments):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    return CausalGenerator(model=AutoModelForCausalLM.from_config(config), tokenizer=tokenizer, **arguments)


def test_a_tokenizer_without_padding_is_refused_and_a_padding_token_added():
    with pytest.raises(ConfigError, match="no padding token.*give generator.pad_token"):
        llama_for(byte_tokenizer())
    generator = llama_for(byte_tokenizer(), pad_token="<|pad|>")
    assert generator.tokenizer.pad_token_id == generator.pad_token_id == generator.vocab_size - 1
    assert generator.model.get_input_embeddings().weight.shape[0] == len(generator.tokenizer)
    known = llama_for(byte_tokenizer(), pad_token="<|im_start|>")
    assert known.pad_token_id == 1


def test_padding_that_is_the_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ConfigError, match="padding and end token are both 2.*generator.pad_token"):
        llama_for(tokenizer)


def test_answers_are_written_as_they_follow_the_prompt():
    generator = llama_for(byte_tokenizer(pad="<|pad|>", bos=True))
    prompt = Prompt(question_template="\nQuestion: {question}\nAnswer:", answer_prefix=" ")
    model = RagModel(encoder=None, generator=generator, prompt=prompt)
    tokens = generator.tokenizer.convert_ids_to_tokens(model.target_tokens(["Pa"])[0].tolist())
    assert tokens == ["<|bos|>", "ĠPa", "<|im_end|>"]
    joined = generator.tokenizer("Answer: Pa", add_special_tokens=False)["input_ids"]
    assert joined[-1] == model.target_tokens(["Pa"])[0, 1]


def test_a_prompt_that_would_melt_into_the_answer_is_refused():
    tokenizer = byte_tokenizer(pad="<|pad|>")
    assert continuation_ids(tokenizer, [" Pa"], ":") == [tokenizer.convert_tokens_to_ids(["ĠPa"])]
    with pytest.raises(ConfigError, match="joined into one token.*answer_prefix"):
        continuation_ids(tokenizer, ["a"], "P")


def test_contexts_begin_with_the_begin_token_and_have_no_end():
    generator = llama_for(byte_tokenizer(pad="<|pad|>", bos=True))
    assert generator.affixes() == ([0], [])


@pytest.mark.parametrize("system", [None, "Be short."])
def test_chat_contexts_equal_the_template_applied(system, tmp_path):
    tokenizer = byte_tokenizer(pad="<|pad|>", chat=True)
    generator = llama_for(tokenizer, chat=True, system=system)
    corpus_file = tmp_path / "passages.jsonl"
    corpus_file.write_text('{"id": "1", "title": "Paris", "text": "A city."}\n')
    model = RagModel(encoder=None, generator=generator)
    assembler = ContextAssembler(
        corpus=PassageCorpus.read(str(corpus_file)),
        tokenizer=tokenizer,
        prompt=model.prompt,
        affixes=generator.affixes(),
    )
    found = assembler.contexts(torch.tensor([[0]]), model.prompt_tokens(["what is Paris?"]))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Paris / A city. // what is Paris?"})
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found.input_ids[0].tolist() == expected


def test_chat_without_a_template_and_a_system_message_without_chat_are_refused():
    with pytest.raises(ConfigError, match="expected a tokenizer with a chat template"):
        llama_for(byte_tokenizer(pad="<|pad|>"), chat=True)
    with pytest.raises(ConfigError, match="expected generator.chat=true"):
        llama_for(byte_tokenizer(pad="<|pad|>"), system="Be short.")
    swallowing = byte_tokenizer(pad="<|pad|>", chat=True)
    swallowing.chat_template = "hello"
    with pytest.raises(ConfigError, match="expected the chat template to write a user's words"):
        chat_affixes(swallowing)
    strict = byte_tokenizer(pad="<|pad|>", chat=True)
    strict.chat_template = "{{ raise_exception('no system turns') if messages[0]['role'] == 'system' }}" + CHATML
    with pytest.raises(ConfigError, match="writes turns of system, user, but it says: no system turns"):
        llama_for(strict, chat=True, system="Be short.").affixes()


def test_a_chat_ends_an_answer_as_its_template_does_not_as_the_tokenizer():
    tokenizer = byte_tokenizer(pad="<|pad|>", chat=True)
    tokenizer.eos_token = "<|bos|>"
    assert llama_for(tokenizer, chat=True).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert llama_for(tokenizer).eos_token_id == tokenizer.convert_tokens_to_ids("<|bos|>")


def test_a_question_that_is_too_long_is_cut_and_what_stands_behind_it_is_not():
    generator = llama_for(byte_tokenizer(pad="<|pad|>"))
    prompt = Prompt(question_template="\nQuestion: {question}\nAnswer:", max_passage_tokens=8, max_tokens=60)
    tokens = RagModel(encoder=None, generator=generator, prompt=prompt).prompt_tokens(["x" * 100, "y"])
    long, short = (generator.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*_rows(tokens), strict=True))
    assert long == "\nQuestion: " + "x" * (30 - 11 - 8) + "\nAnswer:"
    assert short == "\nQuestion: y\nAnswer:"


def test_a_dialogue_that_is_too_long_loses_its_beginning():
    generator = llama_for(byte_tokenizer(pad="<|pad|>"))
    template = "\nQuestion: {question}\nAnswer:"
    prompt = Prompt(question_template=template, max_passage_tokens=8, max_tokens=60, keep_question="end")
    tokens = RagModel(encoder=None, generator=generator, prompt=prompt).prompt_tokens(["x" * 90 + "end", "y"])
    long, short = (generator.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*_rows(tokens), strict=True))
    assert long == "\nQuestion:" + "x" * (30 - 10 - 8 - 3) + "end\nAnswer:"
    assert short == "\nQuestion: y\nAnswer:"


def _rows(tokens):
    return tokens.input_ids, tokens.attention_mask


# ---------------------------------------------------------------------- in training, saved and loaded


@pytest.fixture
def causal_model(tiny_world, tiny_encoder):
    def build(**settings):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        generator = CausalGenerator.from_config(
            model_type="llama",
            settings={**sizes, "num_key_value_heads": 2, "max_position_embeddings": 256},
            tokenizer=str(tiny_world.tokenizer),
        )
        return RagModel(
            encoder=tiny_encoder(),
            generator=generator,
            prompt=Prompt(max_passage_tokens=40, max_tokens=200),
            settings=RagSettings(num_passages=3, temperature=0.1, max_target_tokens=8, **settings),
            decoding_options=DecodingOptions(max_new_tokens=6),
        )

    return build


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "stuffed"])
def test_it_trains_and_answers(kind, causal_model, tiny_run, tiny_world):
    mode = {"rag_sequence": "rag_sequence_thorough"}.get(kind, kind)
    model = causal_model(objective=kind, decoding=mode)
    run = tiny_run(
        model=model, objective=MarginalObjective(kind=kind), data={"test": str(tiny_world.test)}, max_steps=30
    ).fit()
    assert sum(run.recorder.losses[-5:]) < 0.8 * sum(run.recorder.losses[:5])
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert len(run.module.predictions) > 0
    assert all(len(prediction.passages) == 3 for prediction in run.module.predictions)


def test_leaving_one_out_of_a_prompt_asks_again_without_each(causal_model, tiny_run):
    """LOOP of a stuffed reader, against prompts put together by hand."""
    losses = {"loop": LeaveOneOut(temperature=1.0, per_token=False)}
    objective = MarginalObjective(kind="stuffed", retriever_losses=losses)
    run = tiny_run(model=causal_model(objective="stuffed", decoding="stuffed"), objective=objective)
    run.data.setup("fit")
    run.data.ensure_index(step=0)
    run.data.trainer = None
    model = run.module.model.eval()
    batch = next(iter(run.data.train_dataloader()))
    with torch.no_grad():
        outcome = objective(model, batch, Sources(run.data.assembler, run.data.retriever))
        for row in range(len(batch.questions)):
            useful = []
            for place in range(3):
                ids = outcome.hits.ids_BK[row : row + 1, [k for k in range(3) if k != place]]
                prompt = TokenBatch(batch.prompt.input_ids[row : row + 1], batch.prompt.attention_mask[row : row + 1])
                encoded = model.generator.encode(run.data.assembler.stuffed(ids, prompt))
                useful.append(-model.generator.score(encoded, batch.labels[row : row + 1], 1).token_log_probs_BKT.sum())
            target = torch.stack(useful).softmax(dim=0)
            prior = outcome.marginal.log_prior_BK[row]
            expected = (target * (target.log() - prior)).sum()
            torch.testing.assert_close(outcome.terms["loop"][row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("objective", "decoding"), [("rag_token", "stuffed"), ("stuffed", "rag_token")])
def test_a_model_may_be_tested_with_the_other_way_of_reading(objective, decoding, causal_model, tiny_run, tiny_world):
    run = tiny_run(
        model=causal_model(objective=objective, decoding=decoding),
        objective=MarginalObjective(kind=objective),
        data={"test": str(tiny_world.test)},
        max_steps=2,
    ).fit()
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    model = run.module.model.eval()
    for prediction, again in zip(
        run.module.predictions[:3],
        model.generate(run.data.questions["test"][:3], retriever=run.data.retriever),
        strict=True,
    ):
        assert prediction.answer == again.answer
        assert prediction.log_likelihood == pytest.approx(again.log_likelihood, abs=1e-4)


def test_prompts_longer_than_the_positions_are_refused_before_training(causal_model, tiny_run):
    model = causal_model()
    model.prompt = Prompt(max_passage_tokens=40, max_tokens=250)
    with pytest.raises(ConfigError, match="max_tokens=250: expected at most 248, .* 256 positions, 8 of them for the"):
        tiny_run(model=model)


@pytest.mark.parametrize("kind", ["rag_token", "stuffed"])
def test_replug_teaches_the_retriever_of_a_reader_that_stays_as_it_is(kind, causal_model, tiny_run):
    losses = {"replug": PerplexityDistillation(temperature=1.0, per_token=False, direction="reverse")}
    objective = MarginalObjective(kind=kind, marginal_weight=0.0, retriever_losses=losses)
    run = tiny_run(model=causal_model(objective=kind), objective=objective)
    before = run.weights()
    after = run.fit().weights()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("generator"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("encoder.query"))


def test_a_saved_model_answers_the_same(causal_model, tmp_path):
    model = causal_model().eval()
    model.save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert isinstance(again.generator, CausalGenerator)
    prompt = model.prompt_tokens(["who made it?"])
    contexts = ContextAssembler(
        corpus=None, tokenizer=model.generator.tokenizer, prompt=model.prompt, affixes=model.generator.affixes()
    ).without_passage(prompt)
    labels = model.target_tokens(["a name"])
    scores = [m.generator.score(m.generator.encode(contexts), labels, 1).token_log_probs_BKT for m in (model, again)]
    assert torch.equal(*scores)


def test_stuffing_writes_all_passages_best_first_and_cuts_the_last(tiny_world, causal_model, caplog):
    model = causal_model()
    corpus = PassageCorpus.read(str(tiny_world.passages))
    tokenizer = model.generator.tokenizer
    question = model.prompt_tokens(["who made it?"])
    asked, ids = question.input_ids[0].tolist(), torch.tensor([[2, -1, 0]])
    separator = tokenizer(" / ", add_special_tokens=False)["input_ids"]
    assert separator

    def stuffed(max_tokens):
        prompt = Prompt(max_passage_tokens=20, max_tokens=max_tokens, passage_separator=" / ")
        assembler = ContextAssembler(corpus=corpus, tokenizer=tokenizer, prompt=prompt, affixes=([1], []))
        first, _, second = (part.tolist() for part in assembler.passage_tokens(ids.reshape(-1).numpy()))
        whole = [1, *first, *separator, *second, *asked]
        return [assembler.stuffed(ids, question).input_ids[0].tolist() for _ in range(2)], whole

    (found, _), whole = stuffed(200)
    assert found == whole
    assert "do not fit" not in caplog.text
    (cut, again), _ = stuffed(len(whole) - 3)
    assert cut == again == whole[: len(whole) - 3 - len(asked)] + asked
    assert caplog.text.count("do not fit into one prompt") == 1


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "stuffed"])
def test_with_adapters_it_trains_answers_and_is_saved_without(kind, causal_model, tiny_run, tiny_world, tmp_path):
    pytest.importorskip("peft")
    mode = {"rag_sequence": "rag_sequence_thorough"}.get(kind, kind)
    model = causal_model(objective=kind, decoding=mode)
    add_lora(model.generator, LoraSettings(rank=4, target_modules="all-linear"))
    run = tiny_run(
        model=model, objective=MarginalObjective(kind=kind), data={"test": str(tiny_world.test)}, max_steps=30
    ).fit()
    assert sum(run.recorder.losses[-5:]) < sum(run.recorder.losses[:5])
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    model.eval().save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name, _ in again.named_parameters())
    questions = run.data.questions["test"][:4]
    for one, other in zip(*(m.generate(questions, retriever=run.data.retriever) for m in (model, again)), strict=True):
        assert one.answer == other.answer
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)
