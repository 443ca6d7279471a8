"""Runs become folders that transformers and sentence-transformers load, and give the same there."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from parity_text import vary, word_tokenizer

import mmpre
from mmpre.command_line.cli import main
from mmpre.exchange.export import Check, ExportError, export
from mmpre.exchange.imported_run import _write
from mmpre.exchange.imports import ImportedError, fill
from mmpre.plugins import find_recipe
from mmpre.recipes.exports import bert as bert_export
from mmpre.recipes.exports import electra, modernbert, roberta, sentences, vit, vit_mae, wav2vec2_bert
from mmpre.recipes.imports import bert as bert_family
from mmpre.recipes.imports import modernbert as modernbert_family
from mmpre.recipes.imports import vit as vit_family
from mmpre.recipes.imports import wav2vec2_bert as speech_family
from mmpre.runs.options import RunOptions
from mmpre.runs.run import build, new_record

TEXT = dict(width=32, depth=2, heads=4, length=16, dropout=0.0, steps=2, warmup=1, batch=4, micro_batches=1)
EXPORTS = {"bert": bert_export, "electra": electra, "modernbert": modernbert, "roberta": roberta,
           "sentences": sentences, "vit": vit, "vit_mae": vit_mae, "wav2vec2_bert": wav2vec2_bert}  # fmt: skip
IMPORTS = {"bert": bert_family, "modernbert": modernbert_family, "vit": vit_family, "wav2vec2_bert": speech_family}


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    """Those of this tree, whatever entry points are installed."""
    monkeypatch.setattr("mmpre.exchange.imports.survey", lambda kind: (IMPORTS, {}))
    monkeypatch.setattr("mmpre.exchange.export.survey", lambda kind: (EXPORTS, {}))


def a_run(out: Path, recipe: str, **numbers) -> Path:
    """A run at step 0 with weights that are not those at the start."""
    found = find_recipe(recipe)
    record = new_record(found, None, found.numbers(None, numbers), RunOptions())
    module = build(found, record["numbers"], 0).module()
    vary(module)
    _write(out, module, record)
    return out


def word_file(tmp_path: Path, *, of_roberta: bool = False) -> str:
    path = tmp_path / "tokenizer.json"
    word_tokenizer(roberta=of_roberta).save(str(path))
    return str(path)


def same(exported, *whats):
    assert exported.checks[0] == Check("tensors", 0.0, 0.0)
    assert all(0 <= one.difference <= 1.0001e-5 * max(1, one.limit / 1e-5) for one in exported.checks)
    assert all(any(what in one.what for one in exported.checks) for what in whats)


@pytest.mark.fault("D16")
@pytest.mark.parametrize("to", ["bert", "electra", "roberta"])
def test_bert_goes_to_transformers_and_comes_back_bit_for_bit(to, tmp_path):
    run = a_run(tmp_path / "run", "bert", tokenizer=word_file(tmp_path, of_roberta=to == "roberta"), **TEXT)
    told = export(run, tmp_path / "out", to=to)
    same(told, "states of 5 made rows of 3 to 16 tokens", "scores of words", "texts of 9")
    recipe = mmpre.load(run).untrained()
    report = fill(recipe.module(), tmp_path / "out")
    assert report.missing == [] and report.left == []
    own = mmpre.load(run).recipe.module().state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in recipe.module().state_dict().items())


MODERN = TEXT | dict(depth=4, hidden=40, reach=2, growth=0)


@pytest.mark.parametrize("numbers", [{}, {"theta": 300.0}, {"every": 1}, {"every": 2, "reach": 1, "local_theta": 50.0}])
def test_modernbert_goes_to_transformers_and_comes_back_bit_for_bit(numbers, tmp_path):
    run = a_run(tmp_path / "run", "modernbert", tokenizer=word_file(tmp_path), **MODERN | numbers)
    told = export(run, tmp_path / "out")
    assert told.target == "ModernBertForMaskedLM of transformers" and not told.notes
    same(told, "states of 5 made rows of 3 to 16 tokens", "scores of words", "texts of 9")
    recipe = mmpre.load(run).untrained()
    report = fill(recipe.module(), tmp_path / "out")
    assert report.missing == [] and report.left == []
    own = mmpre.load(run).recipe.module().state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in recipe.module().state_dict().items())
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")).__name__ == "ModernBertForMaskedLM"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"reach": 3}, r"layer 1 sees Window\(reach=3\) by rotary .* base 10000, theirs Window\(reach=2\) by"),
        ({"theta": 160_000.0}, "layer 0 sees whole rows by .* base 160000, theirs whole rows by .* base 10000"),
        ({"every": 2}, r"layer 2 sees whole rows by .*, theirs Window\(reach=2\) by rotary"),
    ],
)  # fmt: skip
def test_weights_of_another_attention_are_refused_though_their_shapes_fit(numbers, message, tmp_path):
    run = a_run(tmp_path / "run", "modernbert", tokenizer=word_file(tmp_path), **MODERN)
    export(run, tmp_path / "out")
    other = find_recipe("modernbert").build(
        find_recipe("modernbert").numbers(None, MODERN | numbers | {"tokenizer": word_file(tmp_path)})
    )
    with pytest.raises(ImportedError, match=message):
        fill(other.module(), tmp_path / "out")


def test_what_modernbert_has_not_is_told(tmp_path):
    run = a_run(tmp_path / "run", "mosaicbert", tokenizer=word_file(tmp_path), **TEXT)
    with pytest.raises(ExportError, match=r"norms are placed by PostNorm, there by PreNorm.*ALiBi is added"):
        export(run, tmp_path / "out", to="modernbert")
    run = a_run(tmp_path / "bert", "bert", **TEXT)
    with pytest.raises(ExportError, match="a layer has Attention and FeedForward, the class has Attention and Gated"):
        export(run, tmp_path / "out", to="modernbert")


def test_what_is_written_answers_as_transformers_models_do(tmp_path):
    run = a_run(tmp_path / "run", "bert", **TEXT)
    export(run, tmp_path / "out", to="bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "BertForMaskedLM" and tokenizer.model_max_length == 16
    made = tokenizer(["tiny é", "hi"], padding=True, return_tensors="pt")
    assert made["input_ids"][1, :4].tolist() == [256, 104, 105, 257]
    assert tokenizer.decode(made["input_ids"][0], skip_special_tokens=True) == "tiny é"
    assert model(**made).logits.shape == (2, made["input_ids"].shape[1], 259)
    assert json.loads((tmp_path / "out" / "mmpre.json").read_text())["differences"]["tensors"] == 0


def test_two_stages_share_a_head_and_a_trained_run_is_exported_by_the_command(tmp_path, capsys):
    numbers = {n: v for n, v in TEXT.items() if n not in ("length", "steps", "warmup", "batch")}
    run = a_run(tmp_path / "run", "two_stage", tokenizer=word_file(tmp_path), short=8, long=16, **numbers)
    main(["export", str(run), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "BertForMaskedLM of transformers, from step 0" in told
    assert "tensors: largest difference 0, allowed 0" in told
    assert "written as bert; electra" in told
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "out")])
    assert "out is there already; remove it, or give another --out" in capsys.readouterr().err


def test_mosaicbert_without_its_own_parts_is_a_bert_and_with_them_has_no_class(tmp_path):
    plain = a_run(tmp_path / "plain", "mosaicbert", alibi=False, gated=False, **TEXT)
    same(export(plain, tmp_path / "out"))
    run = a_run(tmp_path / "run", "mosaicbert", **TEXT)
    with pytest.raises(ExportError) as caught:
        export(run, tmp_path / "other")
    message = str(caught.value)
    assert "BertForMaskedLM of transformers: ALiBi is added to attention's scores" in message
    assert "it has GatedFeedForward where the class has FeedForward; no positions are added" in message
    assert f"mmpre embed {run}" in message and "mmpre.load(" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("to", ["vit", "vit_mae"])
def test_mae_goes_to_transformers(to, tmp_path):
    numbers = dict(
        width=32, depth=2, heads=4, decoder_width=16, decoder_depth=1, decoder_heads=2, patch_px=8, side_px=32
    )
    run = a_run(tmp_path / "run", "mae", **numbers)
    told = export(run, tmp_path / "out", to=to)
    same(told, *(["states of 2 made pictures of 32 pixels"] if to == "vit" else ["24 hidden patches", "loss"]))
    assert told.notes[0].startswith("the image processor makes all pictures squares of 32 pixels")
    assert "mask_D of the modality: the class has no place for it" in told.notes
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.image_size, config.patch_size) == (32, 8)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32


SPEECH = dict(stack=2, channels=(), noise=0.0, width=32, depth=1, more_depth=2, heads=2, kernel=5, causal=True, codes=8,
              values=8, compare=8, steps=2, warmup=1, batch=4, micro_batches=1)  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_w2v_bert_goes_to_transformers_and_hears_there_what_it_hears_here(noise, tmp_path):
    run = a_run(tmp_path / "run", "w2v_bert", **SPEECH | dict(noise=noise))
    told = export(run, tmp_path / "out")
    tensors, frames, states = told.checks
    assert tensors == Check("tensors", 0.0, 0.0)
    assert frames.what == "frames of 2 made utterances of 34 to 64 tokens" and 0 <= frames.difference <= 1e-3
    assert states.what == "states of 2 made utterances of 34 to 64 tokens" and states.difference <= states.limit
    assert told.notes[0] == "cut recordings into 15 s, as mmpre did in training"
    assert (len(told.notes) == 2) == (noise > 0)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Wav2Vec2BertModel" and model.config.conv_depthwise_kernel_size == 5
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.feature_size, extractor.stride, extractor.sampling_rate) == (80, 2, 16_000)
    report = fill(mmpre.load(run).untrained().module(), tmp_path / "out")
    assert report.left == [] and all(not name.startswith("network.") for name in report.missing)


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (dict(causal=False), "its convolutions look ahead, the class's back alone"),
        (dict(stack=4), "its tokens are 4 frames, those of the class's extractor 2"),
        (dict(stack=4, channels=(4, 2), noise=0.1), "it hears through convolutions, the class mel frames as they are"),
    ],
)
def test_speech_that_the_class_cannot_hear_is_refused(numbers, why, tmp_path):
    run = a_run(tmp_path / "run", "w2v_bert", **SPEECH | numbers)
    with pytest.raises(ExportError, match=why):
        export(run, tmp_path / "out")
    run = a_run(tmp_path / "other", "masked", modality="speech", stack=2, width=32, depth=1, heads=2)
    with pytest.raises(ExportError, match="its layers are not a conformer's with relative keys, in the class's order"):
        export(run, tmp_path / "out")


def test_a_text_embedder_goes_to_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    run = a_run(tmp_path / "run", "bert", tokenizer=word_file(tmp_path), **TEXT)
    told = export(run, tmp_path / "out", to="sentences")
    same(told, "vectors of 5 texts")
    assert "pooled by the mean over all tokens; the recipe pools nothing" in told.notes
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.encode(["w1 w2", "w3"]).shape == (2, 32)


def test_a_network_of_two_modalities_has_no_class(tmp_path):
    run = a_run(tmp_path / "run", "uniter", width=32, depth=1, heads=4, features=16, classes=7)
    with pytest.raises(ExportError, match="its rows hold text and image, the class reads text alone"):
        export(run, tmp_path / "out")
    with pytest.raises(
        ExportError, match=r"the exporter 'vit' is not for a network that reads text \(Text\) and image"
    ):
        export(run, tmp_path / "out", to="vit")
    with pytest.raises(ExportError, match="there is no exporter 'gpt'; there are bert, electra"):
        export(run, tmp_path / "out", to="gpt")


@pytest.mark.fault("D16")
def test_what_is_not_the_same_there_or_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run", "bert", **TEXT)
    real = bert_export.to_theirs

    def swapped(table, tensors):
        found = real(table, tensors)
        for name in [one for one in found if "self.query.weight" in one]:
            other = name.replace("query", "key")
            found[name], found[other] = found[other], found[name]
        return found

    monkeypatch.setattr(bert_export, "to_theirs", swapped)
    with pytest.raises(
        ExportError, match=r"was not exported: .* tensors: largest difference .*; states of 5 made rows"
    ):
        export(run, tmp_path / "out")

    def interrupted(recipe, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(bert_export.exporter, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_network_that_was_trained_to_see_less_is_refused(tmp_path):
    path = tmp_path / "left_to_right.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from mmpre.attention import Causal\n"
        "from mmpre.recipe import Recipe\n"
        "from mmpre.recipes.bert import bert\n\n\n"
        "def left_to_right(width: int = 32) -> Recipe:\n"
        "    made = bert(width=width, depth=1, heads=2, length=16)\n"
        "    (task,) = made.stages[0].tasks\n"
        "    task = replace(task, view=replace(task.view, attend=Causal()))\n"
        "    return Recipe([replace(made.stages[0], tasks=[task])], made.network)\n"
    )
    differs = bert_export.exporter.differs(find_recipe(path).build({}))
    assert differs == ["it was trained with Causal attention, the class sees whole rows"]
