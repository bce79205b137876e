"""Checkpoints and tokenizers against `transformers` and `tokenizers`; bad input. No network: what is compared is made on the spot.

With RA3_SMOLLM2=<folder of SmolLM2-135M> in the environment, also that real model.
"""
import copy
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors import SafetensorError

import bench
import elbo
import model
import mstep
from base.pretrain import GPT2_CUTS, write_tokenizer
from model import GPT, GPTConfig, encode_prompt, generate, load_pretrained, load_tokenizer, save_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------------------- weights: tiny checkpoints

SMALL = dict(vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=256, eos_token_id=7, bos_token_id=None)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {    # name: (class of the reference, its configuration)
    "llama3": ("Llama", dict(SMALL, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=False, eos_token_id=[7, 9])),
    "qwen2.5": ("Qwen2", dict(SMALL, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(SMALL, rope_theta=1e6, rms_norm_eps=1e-6, head_dim=16, tie_word_embeddings=True)),
    "smollm2": ("Llama", dict(SMALL, rope_theta=100_000.0, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)),
}


def reference(family):
    """A random `transformers` model whose every weight matters: by default norms are 1, biases 0 and logits nearly flat."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    ref = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**settings)).eval()
    with torch.no_grad():
        for p in ref.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else 1 + 0.3 * torch.randn_like(p))
    return ref


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> (folder in the Hugging Face layout, the reference)."""
    out = {}
    for family in FAMILIES:
        folder, ref = tmp_path_factory.mktemp(family), reference(family)
        ref.save_pretrained(folder)
        out[family] = folder, ref
    return out


@torch.no_grad()
def difference(ours: GPT, ref, length=200):
    tokens = torch.randint(0, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    return (ours(tokens) - ref(tokens).logits).abs().max().item()


def greedy(ref, prompt, n):
    """n tokens of the reference without cache, by argmax."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(ref(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tokens[len(prompt):]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_continuations_equal_the_reference(checkpoints, family):
    folder, ref = checkpoints[family]
    ours = GPT.from_pretrained(folder)
    assert difference(ours, ref) < 1e-4
    prompts = [[(7 * i + j * j) % 160 for j in range(3 + 5 * i)] for i in range(4)]
    samples = generate(ours, prompts, max_new_tokens=24, seeds=[0] * 4, temperature=0, stop_ids=())
    assert [s.tokens for s in samples] == [greedy(ref, p, 24) for p in prompts]
    assert ours.config.eos_id == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_shards(checkpoints, family, tmp_path):
    _, ref = checkpoints[family]
    ref.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert difference(GPT.from_pretrained(tmp_path), ref) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_older_layout_of_config(checkpoints, family, tmp_path):
    """Before version 5, `transformers` wrote rope_theta and rope_scaling, as most folders on the hub have them."""
    folder, ref = checkpoints[family]
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert difference(GPT.from_pretrained(tmp_path), ref) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_transformers_loads(checkpoints, family, tmp_path):
    folder, _ = checkpoints[family]
    ours = GPT.from_pretrained(folder)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.01 * torch.randn_like(p))                      # as training does; the file it was mapped from must not change
    ours.save_pretrained(tmp_path / "new" / "folder")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again).__name__ == FAMILIES[family][0] + "ForCausalLM"
    assert difference(ours, again.eval()) < 1e-4
    back = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert back.config == ours.config and all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters(), strict=True))
    assert difference(GPT.from_pretrained(folder), checkpoints[family][1]) < 1e-4
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_save_over_the_file_that_is_mapped(checkpoints, tmp_path):
    GPT.from_pretrained(checkpoints["llama3"][0]).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(GPT.from_pretrained(tmp_path).parameters(), model.parameters()))


def test_dtypes(checkpoints, tmp_path):
    ours = GPT.from_pretrained(checkpoints["qwen2.5"][0])
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(ours.parameters(), half.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in GPT.from_pretrained(tmp_path).parameters())
    tokens = torch.arange(50)[None]
    with torch.no_grad():                                           # the angles must not be rounded to bfloat16 with the weights
        assert (ours.to(torch.bfloat16)(tokens) - half(tokens)).abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_unpermuted_q_and_k_are_caught(checkpoints, family):
    """Checkpoints in Meta's and llama.cpp's own layouts pair neighbouring dimensions in the rotation, those on the hub the two halves.

    Weights of the wrong layout load without complaint; only the comparison of logits tells.
    """
    folder, ref = checkpoints[family]
    ours = GPT.from_pretrained(folder)
    assert difference(ours, ref) < 1e-4
    C = ours.config.head_dim
    with torch.no_grad():
        for block in ours.layers:
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj):
                w = proj.weight.view(-1, 2, C // 2, ours.config.d_model)
                proj.weight.copy_(w.transpose(1, 2).reshape(proj.weight.shape))
    assert difference(ours, ref) > 0.1


def test_tied_checkpoint_that_stores_its_head(checkpoints, tmp_path):
    """Some tools write lm_head.weight though it is tied: a copy of the embedding, which is not loaded twice."""
    from safetensors.torch import load_file, save_file
    folder, ref = checkpoints["smollm2"]
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert difference(GPT.from_pretrained(tmp_path), ref) < 1e-4


def test_weights_are_mapped_not_copied(tmp_path):
    """Loading 64 MB of the asked dtype grows the process by far less than 64 MB: the parameters are the file's pages."""
    GPT(GPTConfig(vocab_size=32_768, d_model=512, n_layer=1, d_ff=64)).save_pretrained(tmp_path)
    GPT(GPTConfig()).save_pretrained(tmp_path / "warm")
    GPT.from_pretrained(tmp_path / "warm")                          # imports and allocator
    private = lambda: sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous")) / 1e3
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("memory is measured through Linux's /proc")
    before = private()
    model = GPT.from_pretrained(tmp_path)
    assert private() - before < 10 and sum(p.numel() for p in model.parameters()) * 4 > 64e6
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)                           # and yet they can be trained: a changed page becomes ours
    assert private() - before > 60


# ------------------------------------------------------------------------------------------------------------- tokenizers

LLAMA3_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_CUTS = LLAMA3_CUTS.replace(r"\p{N}{1,3}", r"\p{N}")


@pytest.fixture(scope="module")
def corpus():
    """Python sources of the standard library that also hold some Unicode."""
    lib = Path(os.__file__).parent
    return [(lib / f).read_text(encoding="utf-8") for f in ("heapq.py", "textwrap.py", "random.py", "json/decoder.py", "html/entities.py", "locale.py")]


def train(kind, corpus, vocab=1500):
    """A `tokenizers` tokenizer of the given kind, trained on the corpus."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    split = lambda cuts: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cuts), "isolated"), level(False)])
    tok.pre_tokenizer = {"gpt2": level(True), "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(True)]),
                         "llama3": split(LLAMA3_CUTS), "qwen": split(QWEN_CUTS)}[kind]
    if kind == "qwen":
        tok.normalizer = normalizers.NFC()
    tok.decoder = decoders.ByteLevel()
    # SmolLM2 lacks the bytes that its corpus lacked; the others begin with all 256.
    alphabet = [] if kind == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False,
                                                        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    return tok


def strings(corpus, n=3000, seed=0):
    """n strings: slices of code, random Unicode, whitespace, digits, and mixtures."""
    rng, old = random.Random(seed), unicodedata.ucd_3_2_0    # of newer characters the two libraries may have different tables
    code = "\n".join(corpus)
    spaces = " \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000"
    digits = "0123456789٣४²½Ⅷ五"
    marks = "eéạ̈ñç中文字かなカ한글абвγδאבعر😀👩\u200d🔬ſ'’\u0301\u0338>=ﬁÅÅ\ufeff"
    signs = "+-*/=<>()[]{}:;,.'\"#@!?_\\|&^%$~`"
    draw = [lambda: (lambda i: code[i:i + rng.randrange(1, 200)])(rng.randrange(len(code))),
            lambda: "".join(rng.choice(spaces) for _ in range(rng.randrange(1, 9))),
            lambda: " " * rng.randrange(1, 18) + rng.choice(["", "\n", "x", "7"]),
            lambda: "".join(rng.choice(digits) for _ in range(rng.randrange(1, 9))),
            lambda: "".join(rng.choice(marks) for _ in range(rng.randrange(1, 9))),
            lambda: "".join(rng.choice(signs) for _ in range(rng.randrange(1, 9))),
            lambda: "".join(c for c in map(chr, (rng.randrange(1, 0x3000) for _ in range(6))) if old.category(c) != "Cn"),
            lambda: rng.choice(["'s", "'S", "I'm", "'ll", "'re x", "don't", "  'd", "\r\n", "):\n", "    return x\n"])]
    return ["".join(rng.choice(draw)() for _ in range(rng.randrange(1, 5))) for _ in range(n)] + ["", " ", "\n", code]


def assert_same_tokens(enc, tok, texts):
    """Equal ids, without and with special tokens in the text."""
    for text in texts:
        expected = tok.encode(text, add_special_tokens=False).ids
        assert enc.encode(text) == expected, repr(text)
        if not any(special in text for special in enc._special_tokens):
            assert enc.encode_ordinary(text) == expected, repr(text)
        if "<|im_start|>" in enc._special_tokens:
            special = f"<|im_start|>{text}<|endoftext|>{text}"
            assert enc.encode(special) == tok.encode(special, add_special_tokens=False).ids, repr(special)
            assert not set(enc.encode_ordinary(special)) & set(enc._special_tokens.values())


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3", "qwen"])
def test_tokens_equal_those_of_tokenizers(kind, corpus, tmp_path):
    tok = train(kind, corpus)
    tok.save(str(tmp_path / "tokenizer.json"))
    enc, texts = load_tokenizer(tmp_path), strings(corpus, 800)
    lacking = {b for b in range(256) if bytes([b]) not in enc._mergeable_ranks}
    assert (len(lacking) > 20) == (kind == "smollm2")
    if kind == "smollm2":       # strings with unknown bytes come next
        texts = [t for t in texts if not lacking & set(t.encode())]
    assert len(texts) > (100 if kind == "smollm2" else 800)
    assert_same_tokens(enc, tok, texts)
    assert enc.n_vocab == tok.get_vocab_size()
    for text in texts:
        text = tok.normalizer.normalize_str(text) if tok.normalizer else text
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        cut = len(ids) // 2     # which may be within a character
        assert enc.decode_bytes(ids[:cut]) + enc.decode_bytes(ids[cut:]) == text.encode()


def test_text_that_looks_like_a_special_token_is_text(corpus, tmp_path):
    """Whether the file calls its added tokens special or not, as Qwen's does not <tool_call>; in a copy of the encoding too."""
    tok = train("qwen", corpus, 400)
    tok.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    tok.save(str(tmp_path / "tokenizer.json"))
    enc = load_tokenizer(tmp_path)
    for enc in (enc, pickle.loads(pickle.dumps(enc)), copy.deepcopy(enc)):
        for text, token in (("<tool_call>", tok.token_to_id("<tool_call>")), ("<|endoftext|>", enc.eot_token)):
            assert enc.encode(f"e\u0301 {text}x") == tok.encode(f"é {text}x").ids and token in enc.encode(text)
            ids = enc.encode_ordinary(f"x = '{text}'")
            assert enc.decode(ids) == f"x = '{text}'" and not set(ids) & set(enc._special_tokens.values())
            assert enc.decode_bytes([token]) == text.encode()


def test_bytes_of_tokens_are_exact_within_a_character():
    enc = load_tokenizer(ROOT / "base")
    for text in ("é", "中文", "😀", "a\u0301", "\ufffd"):
        ids = enc.encode_ordinary(text)
        assert [enc.decode_bytes(ids[:i]) + enc.decode_bytes(ids[i:]) for i in range(len(ids) + 1)] == [text.encode()] * (len(ids) + 1)
        assert b"".join(map(enc.decode_single_token_bytes, ids)) == text.encode()
    first = enc.encode_ordinary("😀")[:2]
    assert enc.decode_bytes(first) == "😀".encode()[:2] and "\ufffd" in enc.decode(first)
    assert enc.decode(enc.encode_ordinary("half \ud83d of a pair")) == "half ? of a pair"


def test_long_runs_take_linear_time_and_forks_are_silent():
    """Of spaces GPT-2's pattern, backtracking, could make a matter of hours; the library warns when what used its threads forks."""
    code = """if True:
        import os, time
        from model import load_tokenizer
        enc = load_tokenizer("base")
        def seconds(text):
            began = time.process_time()
            assert enc.decode(enc.encode_ordinary(text)) == text
            return time.process_time() - began
        for run in (" ", "\\n", "x", " \\n"):
            few, many = seconds(run * 10_000), seconds(run * 100_000)
            assert many < 40 * few + 0.1, (run, few, many)
        if os.fork() == 0:
            enc.encode_ordinary("x = 1")
            os._exit(0)
        os.wait()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_begin_of_text_token_stands_where_tokenizers_puts_it(corpus, tmp_path):
    """Llama-3's post-processor sets one before every document; the others set none. Piecewise tokens still join to the whole's."""
    from tokenizers import processors
    tok = train("llama3", corpus)
    bos = tok.token_to_id("<|im_start|>")
    for post in (None, processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]),
                 processors.Sequence([processors.ByteLevel(trim_offsets=False),
                                      processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])])):
        if post is not None:
            tok.post_processor = post
        tok.save(str(tmp_path / "tokenizer.json"))
        enc = load_tokenizer(tmp_path)
        expected = tok.encode("def f(x):\n    return x\n").ids
        assert encode_prompt(enc, "def f(x):\n    return x\n") == expected and (expected[0] == bos) == (post is not None and "Template" in str(post))
        for prompt in ("def f(x):\n   ", ""):
            program = elbo.parse(enc, prompt, "def f(x):\n    return x\n"[len(prompt):], 0)
            assert program.prompt + sum(program.lines, []) == expected + [0] if prompt or enc.bos else [0, *expected, 0]


DATA = Path(os.environ.get("RA3_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def programs():
    """(prompt, solution) of all MBPP and LeetCode problems, and 500 pieces of the standard library."""
    if not (DATA / "leetcode_dataset").is_dir():
        pytest.skip("no leetcode_dataset in ../shared/data")
    names = [f"mbpp-docstring:{split}" for split in ("prompt", "train", "validation", "test")] + ["leetcode:train"]
    library = itertools.islice(mstep.corpus("stdlib", limit=2000), 500)
    problems = [p for name in names for p in bench.load(name, DATA) if p.solution]
    return [(p.prompt, p.solution) for p in problems] + [("", text) for _, text in library]


def assert_pieces_join(enc, programs) -> str:
    """Cut at the decision points and tokenised piece by piece, each program has the tokens of the whole."""
    lines, openers = 0, elbo.opener_mask(enc)
    for prompt, solution in programs:
        p = elbo.parse(enc, prompt, solution, 0)
        pieces = p.prompt + sum(p.lines, [])
        assert (pieces if prompt or getattr(enc, "bos", []) else pieces[1:]) == encode_prompt(enc, prompt + solution) + [0], (prompt, solution)
        assert not any(openers[line[0]] for line in p.lines)
        lines += len(p.lines)
    return f"{len(programs):,} programs, {lines:,} decision points: pieces join"


@pytest.mark.parametrize("kind", ["smollm2", "llama3", "qwen"])
def test_pieces_of_real_programs_join_to_the_tokens_of_the_whole(kind, programs, tmp_path):
    train(kind, [a + b for a, b in programs], 6000).save(str(tmp_path / "tokenizer.json"))
    assert_pieces_join(load_tokenizer(tmp_path), programs)


def test_padding_rows_of_the_vocabulary_are_neither_drawn_nor_scored(tmp_path):
    """Qwen's matrices have a few hundred rows more than its tokenizer has tokens."""
    enc = tiktoken.Encoding("bytes", pat_str=GPT2_CUTS, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={"<|endoftext|>": 256})
    whole = GPT(GPTConfig(vocab_size=264, d_model=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8, d_ff=16, eos_id=256))
    whole.save_pretrained(tmp_path)
    write_tokenizer(enc, tmp_path)
    model, enc = load_pretrained(tmp_path)
    x = torch.tensor([[1, 2, 3]])
    assert enc.n_vocab == 257 and torch.allclose(model(x), whole(x)[..., :257], atol=1e-6) and copy.deepcopy(model)(x).shape[-1] == 257
    with pytest.raises(ValueError, match="do not belong together"):
        GPT(GPTConfig(vocab_size=200, d_model=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8, d_ff=16)).save_pretrained(tmp_path)
        load_pretrained(tmp_path)


def test_unknown_bytes_are_dropped(corpus, tmp_path):
    tok = train("smollm2", [c.encode("ascii", "ignore").decode() for c in corpus])
    tok.save(str(tmp_path / "tokenizer.json"))
    enc = load_tokenizer(tmp_path)
    for text in ["é", "a\x04b", "x = 'é'\n", "def f():\n    return '中'"]:
        ids = enc.encode(text)
        assert ids == enc.encode_ordinary(text) == tok.encode(text).ids and text.encode() != enc.decode_bytes(ids)


def test_our_own_encoding_saved(corpus, tmp_path):
    """An encoding trained with tiktoken, as the embedded world's: what is written reads equal in `tokenizers`, `transformers` and here."""
    from tiktoken._educational import bpe_train
    ranks = bpe_train(corpus[0][:10_000], 499, GPT2_CUTS, visualise=None)
    enc = tiktoken.Encoding("ours", pat_str=GPT2_CUTS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 499})
    write_tokenizer(enc, tmp_path)
    tok, back, texts = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path), strings(corpus, 800)
    assert tok.get_vocab_size() == back.n_vocab == 500 and back.eot_token == 499
    assert all(enc.encode_ordinary(text) == back.encode_ordinary(text) for text in texts)
    assert_same_tokens(back, tok, texts)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [499, 7]}')
    save_tokenizer(back, tmp_path / "copy")
    assert (tmp_path / "copy/generation_config.json").read_bytes() == (tmp_path / "generation_config.json").read_bytes()      # vLLM ends texts by it
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert auto.eos_token_id == 499
    for text in texts[:300]:
        assert auto.encode(text) == enc.encode(text) and auto.decode(auto.encode(text)) == text


def test_the_shipped_base():
    """The embedded world's base model lies in the repository in the same layout."""
    base = Path(__file__).parent.parent / "base"
    if not (base / "config.json").exists():
        pytest.skip("base/ has not been made yet")
    model, enc = GPT.from_pretrained(base), load_tokenizer(base)
    assert model.config.eos_id == enc.eot_token and enc.n_vocab <= model.config.vocab_size
    ref = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    assert difference(model, ref) < 1e-3
    tok = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    text = "def f(xs):\n    # 7 + 8 = 15\n    return [x + 15 for x in xs]\n"
    assert enc.encode(text) == tok.encode(text).ids


# --------------------------------------------------------------------------------------------------------------- bad input


def refused(kind, call, *words):
    """`call` must raise an exception of this kind whose message is one line that holds each of the words."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(w in message for w in words), message
    return True


def edit(folder: Path, target: Path, file: str, change):
    """A copy of a model folder in which one JSON file was changed."""
    target.mkdir()
    for f in folder.iterdir():
        if f.name != file:
            (target / f.name).symlink_to(f)
    content = json.loads((folder / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def test_a_name_that_is_nowhere(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors
    refused(OSError, lambda: GPT.from_pretrained("/no/such/folder"), "'/no/such/folder'", "no folder")
    refused(OSError, lambda: load_tokenizer("a/b/c"), "'a/b/c'", "check the spelling")

    def hub(error):
        def download(*_, **__):
            raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return lambda: GPT.from_pretrained("some/model")

    class Reply:                                                    # what the hub's errors carry, of whichever HTTP library
        headers, request, status_code, text = {}, None, 404, ""
    gated = errors.GatedRepoError("403\nlong story", response=Reply())
    refused(OSError, hub(gated), "'some/model'", "Gated", "accept its terms", "hf auth login")
    refused(OSError, hub(errors.LocalEntryNotFoundError("Got: no route\nand more")), "'some/model'", "no route", "folder")
    refused(OSError, hub(ConnectionError("no route\nto host")), "no route", "the connection")
    refused(OSError, hub(OSError(28, "No space left on device")), "No space left")


def test_a_hub_out_of_reach():
    """A port where nobody listens; in a process of its own, since the hub's address is read when its library is imported."""
    code = "from model import GPT\ntry: GPT.from_pretrained('some/model')\nexcept OSError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    assert "'some/model'" in done.stdout and "check the spelling and the connection" in done.stdout and len(done.stdout.splitlines()) == 1, done


def test_folders_that_are_not_models(checkpoints, tmp_path):
    folder, _ = checkpoints["qwen2.5"]
    load = lambda f: lambda: GPT.from_pretrained(f)
    refused(ValueError, load(tmp_path), "config.json", "No such file", "Hugging Face layout")
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        refused(ValueError, load(tmp_path), "config.json", "download it again")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(ValueError, load(tmp_path), "Missing", "embed_tokens.weight")

    changed = lambda name, **new: load(edit(folder, tmp_path / name, "config.json", lambda c: c.update(new)))
    refused(ValueError, changed("a", model_type="gpt_neox"), "model_type 'gpt_neox'", "qwen3")
    refused(ValueError, changed("b", hidden_act="gelu"), "hidden_act 'gelu'", "silu")
    refused(ValueError, changed("c", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type 'yarn'", "llama3")
    refused(ValueError, changed("d", attention_bias=True), "attention_bias True")
    refused(ValueError, changed("e", use_sliding_window=True), "use_sliding_window True")
    refused(ValueError, changed("f", quantization_config={"bits": 4}), "quantization_config")
    refused(ValueError, changed("i", rope_parameters=None, rope_scaling="linear"), "config.json", "str")
    refused(ValueError, changed("j", head_dim=None, num_attention_heads=0), "config.json", "ZeroDivisionError")
    refused(ValueError, load(edit(folder, tmp_path / "h", "config.json", lambda c: c.pop("hidden_size"))), "hidden_size")


def test_an_adapter_is_named_as_such(tmp_path):
    """A LoRA's folder often has a tokenizer, and never a config.json."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-1.5B"}')
    for call in (GPT.from_pretrained, load_pretrained):
        refused(ValueError, lambda: call(tmp_path), str(tmp_path), "is an adapter (LoRA)", "merge it")


def test_where_the_token_that_ends_a_document_is_found(checkpoints, corpus, tmp_path):
    """config.json, which may give a list or null or nothing; else generation_config.json; else the tokenizer."""
    folder, _ = checkpoints["qwen3"]
    train("qwen", corpus, 160).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def eos(said: dict, generation=None, tokenizer=None):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"} | said))
        for name, content in (("generation", generation), ("tokenizer", tokenizer)):
            file = tmp_path / f"{name}_config.json"
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_text(json.dumps(content))
        return GPT.from_pretrained(tmp_path).config.eos_id
    null, end = dict(eos_token_id=None), dict(eos_token="<|im_end|>")
    assert eos(dict(eos_token_id=0), dict(eos_token_id=5), end) == 0 and eos(dict(eos_token_id=[9, 7])) == 9
    assert eos(null, dict(eos_token_id=[5, 6]), end) == eos({}, dict(eos_token_id=5), end) == 5
    assert eos({}, None, end) == eos(null, null, end) == eos(null, {}, dict(eos_token={"content": "<|im_end|>"})) == 2
    for said, *others in ((null,), ({}, {}, {}), (null, null, dict(eos_token=None)), ({}, None, dict(eos_token="<absent>"))):
        refused(ValueError, lambda: eos(said, *others), "config.json", "eos_token_id is missing", "no other file")


def test_tensors_missing_extra_and_misshapen(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file
    folder, _ = checkpoints["qwen3"]

    def model(name, change):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        return lambda: GPT.from_pretrained(tmp_path / name)
    key, facts = "layers.1.self_attn.q_norm.weight", "cannot be used"
    refused(ValueError, model("missing", lambda t: t.pop("model." + key)), facts, "Missing", key)
    refused(ValueError, model("extra", lambda t: t.update({"model.layers.9.surplus.weight": torch.zeros(2)})), facts, "Unexpected", "layers.9.surplus.weight")
    refused(ValueError, model("shape", lambda t: t.update({"model." + key: torch.zeros(3)})), facts, key, "[3]", "[16]")
    old = model("old", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))      # before transformers 4.32
    assert difference(old(), checkpoints["qwen3"][1]) < 1e-4


def test_damaged_and_absent_shards(checkpoints, tmp_path):
    _, ref = checkpoints["qwen3"]
    ref.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damage in (content[:len(content) // 2], b"", b"\xff" * 100, content[:30]):
        shard.write_bytes(damage)
        refused(ValueError, lambda: GPT.from_pretrained(tmp_path), shard.name, "cannot be used", "download it again")
    shard.unlink()
    refused(ValueError, lambda: GPT.from_pretrained(tmp_path), str(tmp_path), "Missing", "download it again")


def test_nothing_half_written(checkpoints, tmp_path, monkeypatch):
    model = GPT.from_pretrained(checkpoints["qwen3"][0])
    model.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(tensors, file, metadata=None):
        Path(file).write_bytes(b"half a file")
        raise SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr("model.save_file", full_disk)
    with pytest.raises(OSError, match="cannot be written: I/O error: No space left"):
        model.save_pretrained(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_tokenizers_of_other_kinds(corpus, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    train("smollm2", corpus, 400).save(str(good / "tokenizer.json"))
    assert load_tokenizer(good)
    count = iter(range(100))
    changed = lambda change: lambda: load_tokenizer(edit(good, tmp_path / str(next(count)), "tokenizer.json", change))
    kinds = "cannot be used"
    refused(ValueError, lambda: load_tokenizer(tmp_path), "tokenizer.json")
    for change in (lambda t: t["model"].update(type="Unigram"),
                   lambda t: t.update(normalizer={"type": "Lowercase"}),
                   lambda t: t.update(pre_tokenizer={"type": "Metaspace"}),
                   lambda t: t.update(pre_tokenizer=None),
                   lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
                   lambda t: t["model"]["vocab"].update({"▁the": 7000}),
                   lambda t: t["added_tokens"][0].pop("id"),
                   lambda t: t.pop("added_tokens"),
                   lambda t: t.pop("model")):
        refused(ValueError, changed(change), "tokenizer.json", kinds)
    for file, padding in (("a", None), ("b", {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"})):
        truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}     # some files say how a demo cuts
        cut = load_tokenizer(edit(good, tmp_path / file, "tokenizer.json", lambda t: t.update(truncation=truncation, padding=padding)))
        assert cut.decode(cut.encode_ordinary("def f(x):\n    return x\n")) == "def f(x):\n    return x\n"


# -------------------------------------------------------------------------------------------------------- the command line


def test_a_prompt_is_continued_from_where_training_cuts_programs(checkpoints, capsys, monkeypatch):
    """What is printed is the prompt as cut, then what `generate` draws, to the byte; and the cache's logits are those of one pass."""
    def run(prompt, *flags):
        model.main(["--max-new-tokens", "40", *(["--prompt", prompt] if prompt else []), *flags])
        printed = capsys.readouterr()
        gap = float(printed.err.partition(" at most")[0].rsplit(" ", 1)[1])
        assert " tokens in, " in printed.err and gap < 1e-4, printed.err
        return printed.out
    task = 'def f(xs):\n    """add 3 * 4 - 5; total"""\n'
    base, enc = load_pretrained(ROOT / "base")
    for prompt, cut in ((task, task + "   "), (task + "    ", task + "   "), ("x = 1\n\n", "x = 1\n"), ("def f(x):\n", "def f(x):"),
                        ("x = ", "x ="), ("def f(", "def f(")):
        sample, = generate(base, [encode_prompt(enc, cut)], max_new_tokens=40, seeds=[7], temperature=0.9)
        said = sample.tokens[:-1] if sample.stopped else sample.tokens
        assert run(prompt, "--seed", "7", "--temperature", "0.9") == cut + enc.decode(said)
    monkeypatch.setattr("sys.stdin", io.StringIO(task))
    assert run(None).startswith(task + "    xs = ")
    for flags, reason in ((["--model", "/no/such"], "no folder '/no/such'"), (["--prompt", " \n"], "prompt 0 has 0 tokens")):
        with pytest.raises(SystemExit):
            model.main(flags)
        assert reason in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the real SmolLM2

SMOLLM2 = os.environ.get("RA3_SMOLLM2")
real = pytest.mark.skipif(not SMOLLM2, reason="RA3_SMOLLM2 does not name a folder with SmolLM2-135M")


@real
def test_real_smollm2_tokens(corpus):
    enc, tok = load_tokenizer(SMOLLM2), tokenizers.Tokenizer.from_file(str(Path(SMOLLM2) / "tokenizer.json"))
    files = [f.read_text(encoding="utf-8") for f in sorted(Path(os.__file__).parent.glob("*.py"))]
    texts = strings(corpus, 10_000) + files
    assert_same_tokens(enc, tok, texts)
    print(f"\n{len(texts)} strings, {sum(map(len, texts)):,} characters: tokens equal")


@real
def test_real_smollm2_pieces_join(programs):
    print("\n" + assert_pieces_join(load_tokenizer(SMOLLM2), programs))


@real
def test_real_smollm2_logits_and_greedy(corpus):
    ours, enc = GPT.from_pretrained(SMOLLM2), load_tokenizer(SMOLLM2)
    ref = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    text = [t.strip() for c in corpus for t in c.split("\n\n\n") if len(t) > 300][:20]
    prompts = [enc.encode_ordinary(t)[:8 + 3 * i] for i, t in enumerate(text)]
    assert len(prompts) == 20
    whole = torch.tensor([enc.encode_ordinary(corpus[0])[:512]])
    with torch.no_grad():
        a, b = ours(whole), ref(whole).logits
    gap = (a - b).abs().max().item()
    nll = torch.nn.functional.cross_entropy(a[0, :-1], whole[0, 1:]).item()
    samples = generate(ours, prompts, max_new_tokens=64, seeds=[0] * 20, temperature=0, stop_ids=())
    equal = 0
    for prompt, sample in zip(prompts, samples):
        out = ref.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=64, min_new_tokens=64,
                           eos_token_id=None, pad_token_id=0)
        equal += out[0, len(prompt):].tolist() == sample.tokens
    print(f"\nlargest difference of logits {gap:.1e} over {a.numel():,}; {nll:.2f} nats/token; greedy continuations equal: {equal}/20")
    assert gap < 1e-3 and equal == 20
