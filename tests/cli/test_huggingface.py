"""Language models in `transformers` and `lm-evaluation-harness`. Oracles: our own model, `generate` and tokenizers."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from tokenizers import AddedToken, Tokenizer, processors

from revdeq_lightning.data.text.tokenizers import BytePairTokenizer, ByteTokenizer, CharacterTokenizer
from revdeq_lightning.models import generate
from revdeq_lightning.models.build import SolverConfig
from tests.helpers.modules import KINDS, SMALL, make_batch, make_model
from tests.helpers.runs import run

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = [
    pytest.mark.xdist_group("huggingface"),  # one import of the library
    pytest.mark.filterwarnings("ignore"),  # what these libraries say of one another
]
CHARACTERS = "\n abcdefghijklmnopqrstu"  # as many as the small model's vocabulary
END = "<|endoftext|>"
CONTEXT = SMALL["context_length"]
SOLVER = {"solver": "reversible", "beta": 0.8, "max_steps": 3}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save(path, kind="modern", solver=None):
    """A checkpoint with the weights of a small model, which is returned."""
    solver = SolverConfig(**{"solver": "none"} if kind == "explicit" else (solver or SOLVER))
    model = make_model(kind, solver=None if kind == "explicit" else solver.build_solver()).eval()
    content = {
        "hyper_parameters": {"network": asdict(model.config), "solver": asdict(solver)},
        "state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()},
        "tokenizer": CharacterTokenizer(CHARACTERS).state(),
        "global_step": 1,
    }
    torch.save(content, path)
    return model


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Our model, its folder, and what `transformers` loads from it."""
    folder = tmp_path_factory.mktemp("exported")
    ours = save(folder / "small.ckpt")
    run("export", "--ckpt_path", folder / "small.ckpt", "--format=huggingface")
    return SimpleNamespace(ours=ours, folder=folder / "small", theirs=load(folder / "small"))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_texts_equal_ours(kind, tmp_path):
    ours, (tokens, _) = save(tmp_path / "c.ckpt", kind), make_batch()
    run("export", "--ckpt_path", tmp_path / "c.ckpt", "--format=huggingface", "--output", tmp_path / "folder")
    theirs = load(tmp_path / "folder")
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits_BTV, rtol=0, atol=1e-6)
    block = theirs.model.block if kind == "explicit" else theirs.model.equilibrium.f
    lengths, forward = [], block.forward
    block.forward = lambda z, x, *cache: lengths.append(z.shape[1]) or forward(z, x, *cache)
    text = theirs.generate(tokens[:, :7], max_new_tokens=20, do_sample=False)
    assert torch.equal(text, generate(ours, tokens[:, :7], 20, temperature=0))  # beyond the context too
    evaluations = 1 if kind == "explicit" else 6
    if kind == "explicit":
        with pytest.raises(ValueError, match="a model without solver has no solver steps, got max_steps=4: remove it"):
            load(tmp_path / "folder", max_steps=4)
    assert lengths[::evaluations] == [7, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1]
    torch.manual_seed(0)
    text = theirs.generate(tokens[:, :7], max_new_tokens=20, do_sample=True, temperature=0.7, top_k=9, top_p=0.9)
    torch.manual_seed(0)
    assert torch.equal(text, generate(ours, tokens[:, :7], 20, temperature=0.7, top_k=9, top_p=0.9))


def test_solver_steps_and_dtype_are_settings_and_survive_a_round_trip(small, tmp_path):
    tokens, _ = make_batch()
    assert small.theirs.config.max_steps == 3
    assert not small.theirs.config.tie_word_embeddings
    theirs = load(small.folder, max_steps=16)
    more = make_model("modern", solver=replace(small.ours.equilibrium.solver, max_steps=16)).eval()
    torch.testing.assert_close(theirs(tokens).logits, more(tokens).logits_BTV, rtol=0, atol=1e-6)
    type(theirs).register_for_auto_class("AutoModelForCausalLM")  # as loading does in a new process
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    again.config.max_steps = 3
    assert torch.equal(again(tokens).logits, small.theirs(tokens).logits)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_revdeq.py")
    }
    half = load(small.folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(tokens).logits.float(), small.theirs(tokens).logits, rtol=0.1, atol=0.1)  # 8 bits
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        load(small.folder, max_steps=0)


def test_padding_changes_nothing(small):
    tokens, _ = make_batch()
    rows = [tokens[0, :3], tokens[1, :5], tokens[2, :3]]
    left = torch.stack([F.pad(row, (5 - len(row), 0), value=SMALL["vocab_size"]) for row in rows])
    mask = (left != SMALL["vocab_size"]).long()
    text = small.theirs.generate(left, attention_mask=mask, max_new_tokens=14, do_sample=False)
    logits = small.theirs(left, attention_mask=mask).logits
    for i, row in enumerate(rows):
        assert torch.equal(text[i, 5:], generate(small.ours, row[None], 14, temperature=0)[0, len(row) :])
        torch.testing.assert_close(logits[i, -len(row) :], small.ours(row[None]).logits_BTV[0], rtol=0, atol=1e-5)
    right = torch.stack([F.pad(row, (0, 5 - len(row))) for row in rows])
    right_mask = mask.flip(1)
    logits = small.theirs(right, attention_mask=right_mask).logits
    torch.testing.assert_close(logits[0, :3], small.ours(rows[0][None]).logits_BTV[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="generation needs prompts padded on the left"):
        small.theirs.generate(right, attention_mask=right_mask, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask must be 0 only before or after the tokens"):
        small.theirs(tokens[:1, :3], attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="takes no position_ids: remove it"):
        small.theirs(tokens, position_ids=tokens)
    with pytest.raises(ValueError, match="a cache with tokens takes one new token at a time, got 2"):
        small.theirs(tokens[:, 3:5], cache=small.theirs(tokens[:, :3], use_cache=True).cache)


def test_labels_give_the_loss_and_gradients_of_shifted_targets(small):
    tokens, targets = make_batch()
    targets[:, -1] = -100  # the token after the last is not among the inputs
    labels = F.pad(targets[:, :-1], (1, 0), value=-100)
    loss = small.theirs(tokens, labels=labels).loss
    expected = small.ours.loss(tokens, targets).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected, list(small.ours.parameters()))
    torch.testing.assert_close(torch.autograd.grad(loss, list(small.theirs.parameters())), wanted)


def test_a_tolerance_generates_without_cached_keys(tmp_path):
    ours, (tokens, _) = save(tmp_path / "c.ckpt", solver=SOLVER | {"rtol": 1e-3, "max_steps": 20}), make_batch(1)
    run("export", "--ckpt_path", tmp_path / "c.ckpt", "--format=huggingface", "--output", tmp_path / "folder")
    text = load(tmp_path / "folder").generate(tokens[:, :7], max_new_tokens=14, do_sample=False)
    assert torch.equal(text, generate(ours, tokens[:, :7], 14, temperature=0, use_cache=False))


def gpt2(bpe):
    """As GPT-2's file, with what must not change ids: a template that adds a token, truncation, stripped spaces."""
    whole = Tokenizer.from_str(bpe.state()["definition"])
    whole.add_special_tokens([AddedToken(END, lstrip=True)])
    added = [(END, whole.token_to_id(END))]
    whole.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=added)
    whole.enable_truncation(3)
    return BytePairTokenizer(whole.to_str())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our tokenizers, and what `AutoTokenizer` loads from a folder."""
    from revdeq_lightning.cli.export import fast_tokenizer

    bpe = BytePairTokenizer.train(["the cat, the hat  in 12 hats\n\n"] * 9, 300)
    kinds = {"bytes": ByteTokenizer(), "characters": CharacterTokenizer(CHARACTERS), "bpe": bpe, "gpt2": gpt2(bpe)}
    folder, loaded = tmp_path_factory.mktemp("tokenizers"), {}
    for name, ours in kinds.items():
        fast_tokenizer(ours, CONTEXT).save_pretrained(folder / name)
        loaded[name] = ours, transformers.AutoTokenizer.from_pretrained(folder / name)
    return loaded


@settings(max_examples=60, deadline=None)
@given(
    text=strategies.text(strategies.one_of(strategies.characters(codec="utf-8"), strategies.sampled_from(CHARACTERS)))
)
def test_tokens_equal_ours(pairs, text):
    for sample in (text, f"the hat{text}{END} {text}\r\n\n"):
        for ours, theirs in pairs.values():
            try:
                ids = ours.encode(sample)
            except ValueError:  # an unknown character
                if END not in sample:
                    with pytest.raises(Exception, match="Missing"):
                        theirs.encode(sample)
                continue
            assert theirs.encode(sample) == ids
            assert theirs.decode(ids) == sample


@pytest.mark.parametrize(
    ("names", "begins", "ends", "pads"),
    [
        (["[UNK]", "[PAD]", "[BOS]", "[EOS]"], "[BOS]", "[EOS]", "[PAD]"),
        (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
        ([END], END, END, END),
        (["<mask>"], None, END, END),
    ],
)
def test_special_tokens_keep_their_part(names, begins, ends, pads):
    from revdeq_lightning.cli.export import fast_tokenizer

    library = Tokenizer.from_str(BytePairTokenizer.train(["the cat\n"], 260).state()["definition"])
    library.add_special_tokens(names)
    theirs = fast_tokenizer(BytePairTokenizer(library.to_str()), CONTEXT)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (begins, ends, pads)


def test_push_to_hub_uploads_the_folder(small, monkeypatch):
    import huggingface_hub

    uploaded = {}

    def commit(self, repo_id, operations, **_):
        uploaded.update({operation.path_in_repo: operation for operation in operations})

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda *_, **__: huggingface_hub.ModelCard("# small"))
    monkeypatch.setattr(api, "create_commit", commit)
    small.theirs.push_to_hub("somebody/small")
    assert {"config.json", "model.safetensors", "modeling_revdeq.py"} <= set(uploaded)


def test_without_the_package_the_folder_says_what_to_install(small, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "revdeq_lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in str(f)])
    with pytest.raises(ImportError, match=r"^this model needs the package .*: pip install revdeq-lightning$"):
        exec((small.folder / "modeling_revdeq.py").read_text(), {})


@pytest.mark.parametrize(
    ("missing", "words", "told"),
    [
        ("transformers", "export --format=huggingface --output=x", "pip install 'revdeq-lightning[huggingface]'"),
        ("lm_eval", "evaluate --tasks=x", "pip install 'revdeq-lightning[evaluation]'"),
        (None, "export --format=huggingface", "/small exists: choose another --output"),
    ],
)
def test_what_cannot_be_done_is_one_line(small, missing, words, told, monkeypatch, capsys):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit):
        run(*words.split(), "--ckpt_path", small.folder.with_suffix(".ckpt"))
    assert capsys.readouterr().err.endswith(f"{told}\n")


QUESTIONS = [("a b c", ["d", "e f", "g"], 1), ("lmn", ["opq", "r"], 0), ("u u u", ["t", "s s", "a"], 2)]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc}]\n",
    "continuation": "output_type: generate_until\ndoc_to_target: text\n"
    "generation_kwargs: {until: ['a'], max_gen_toks: 4}\n"
    "metric_list: [{metric: exact_match}]\n",
    "unlimited": "output_type: generate_until\ndoc_to_target: text\nmetric_list: [{metric: exact_match}]\n",
}


def test_the_harness_agrees_with_log_likelihoods_by_hand(small, tmp_path, capsys):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra evaluation is not installed")
    pytest.importorskip("accelerate", reason="the extra evaluation is not installed")
    from lm_eval.tasks import TaskManager

    tokenizer = CharacterTokenizer(CHARACTERS)

    @torch.no_grad()
    def nats(context, words, model):
        ids = torch.tensor([tokenizer.encode(f"{context} {words}")])
        log_probs = model(ids[:, :-1]).logits_BTV.log_softmax(-1)[0]
        return sum(log_probs[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1]))

    def continuation(context):
        ids = generate(small.ours, torch.tensor([tokenizer.encode(context)]), 4, temperature=0)[0, len(context) :]
        return tokenizer.decode(ids).split("a")[0]

    rows = [{"question": q, "choices": c, "answer": a, "text": continuation(q)} for q, c, a in QUESTIONS]
    rows[0]["text"] = "something else"
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}doc_to_text: question\n{text}")
    more = make_model("modern", solver=replace(small.ours.equilibrium.solver, max_steps=5)).eval()
    expected = [[nats(q, c, more) for c in choices] for q, choices, _ in QUESTIONS]
    right = [row.index(max(row)) == answer for row, (*_, answer) in zip(expected, QUESTIONS, strict=True)]
    known = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = f"pretrained={small.folder},trust_remote_code=True,max_steps=5"
    found = lm_eval.simple_evaluate("hf", arguments, ["choice"], task_manager=known, device="cpu", batch_size=4)
    replies = [reply for row in found["samples"]["choice"] for reply in row["resps"]]
    assert [float(reply[0][0]) for reply in replies] == pytest.approx(sum(expected, []), abs=1e-4)  # noqa: RUF017

    def figure(task, name, *options):
        options = (*options, "--ckpt_path", small.folder.with_suffix(".ckpt"), "--include_path", tmp_path)
        run("evaluate", "--tasks", task, *options, "--output", tmp_path / "results.json")
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["config"]["model"] == str(small.folder.with_suffix(".ckpt"))
        assert found["config"]["model_args"]["max_steps"] == (5 if "--model.solver.max_steps=5" in options else None)
        return found["results"][task][f"{name},none"]

    assert figure("choice", "acc", "--model.solver.max_steps=5") == pytest.approx(sum(right) / 3)
    assert figure("continuation", "exact_match") == pytest.approx(2 / 3)
    for task, options, told in [
        ("unknown", [], "no task unknown: see `lm_eval ls tasks`"),
        ("unlimited", [], "Invalid configuration: requested max tokens to generate (256) must be less than model's"),
        (" , ", [], "tasks must be names separated by commas, got none"),
        ("choice", ["--limit=0"], "limit must be at least 1, got 0"),
        ("choice", ["--num_fewshot=-1"], "num_fewshot must be at least 0, got -1"),
    ]:
        with pytest.raises(SystemExit):
            figure(task, "acc", *options)
        assert f"error: {told}" in capsys.readouterr().err
