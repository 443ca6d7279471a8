"""Models of transformers and timm, imported from their folders, give the states and scores that they give there."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import transformers
import webdataset
from parity_text import SPECIALS, WORDS, padded, some_batch, some_samples, vary, word_tokenizer
from pictures import noise, sample
from timm.models import save_for_hf
from torch import nn

import mmpre
from mmpre.attention import Full
from mmpre.batch import Row, pack
from mmpre.command_line.cli import main
from mmpre.draw import Draw
from mmpre.encoder import vit_encoder
from mmpre.exchange.imported_run import import_model
from mmpre.exchange.imports import Imported, ImportedError, fill
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.image_patches import ImagePatches, ImageReader, LearnedGrid
from mmpre.network import Network
from mmpre.recipes.bert import bert
from mmpre.recipes.imports import bert as bert_family
from mmpre.recipes.imports import vit as vit_family
from mmpre.recipes.imports import wav2vec2_bert as speech_family
from mmpre.recipes.mae import mae
from mmpre.recipes.w2v_bert import w2v_bert
from mmpre.runs.options import RunOptions
from mmpre.runs.replay import replay
from mmpre.runs.run import RunError
from mmpre.tokens import Tokens
from mmpre.view import View

SIZES = dict(
    vocab_size=len(SPECIALS) + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, max_position_embeddings=20, layer_norm_eps=1e-12, attn_implementation="eager",
)  # fmt: skip
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, layer_norm_eps=1e-6,
           image_size=32, patch_size=8)  # fmt: skip


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """Those of this tree, whatever entry points are installed."""
    known = {"bert": bert_family, "vit": vit_family, "wav2vec2_bert": speech_family}
    monkeypatch.setattr("mmpre.exchange.imports.survey", lambda kind: (known, {}))


def saved(model, folder):
    vary(model)
    model.eval().save_pretrained(folder)
    return model


def a_recipe(tmp_path, *, roberta=False, **numbers):
    path = tmp_path / "tokenizer.json"
    word_tokenizer(roberta=roberta).save(str(path))
    torch.manual_seed(3)
    small = dict(width=32, depth=2, heads=4, length=16, dropout=0.0)
    return bert(tokenizer=str(path), **small | numbers)


def a_vit(**numbers):
    torch.manual_seed(3)
    small = dict(width=32, depth=2, heads=4) | numbers
    image = ImagePatches(ImageReader(8), width=small["width"], places=LearnedGrid(small["width"], 4, 4))
    return Network({"image": image}, vit_encoder(small["width"], small["depth"], small["heads"]))


def same_states(net, theirs, batch):
    ids, valid = padded(batch)
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=valid.long()).last_hidden_state[valid]
        torch.testing.assert_close(net(batch), states, atol=1e-5, rtol=0)
    return states


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_language_model_gives_the_same_states_and_scores(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "bert":
        theirs = saved(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), tmp_path)
        base = theirs.bert
    elif kind == "roberta":
        theirs = saved(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES)), tmp_path)
        base = theirs.roberta
    else:
        config = transformers.ElectraConfig(embedding_size=32, **SIZES)
        theirs = saved(transformers.ElectraForMaskedLM(config), tmp_path)
        base = theirs.electra
    recipe = a_recipe(tmp_path, roberta=kind == "roberta")
    report = fill(recipe.module().eval(), tmp_path)
    assert report.missing == [] and report.left == []
    assert len(report.notes) == 1 and "positions.weight: the first 16 of" in report.notes[0]
    view = View(picks={"word": RandomTokens(role="text", rate=0.3)})
    batch = some_batch(view, recipe.network.readers, some_samples(5))
    same_states(recipe.network, base, batch)
    objective = recipe.stages[0].tasks[0].objective
    readout = objective.readouts[0]
    ids, valid = padded(batch)
    with torch.no_grad():
        scores = readout.head.scores(objective.states(readout, batch))
        logits = theirs(input_ids=ids, attention_mask=valid.long()).logits[valid]
    torch.testing.assert_close(scores, logits[readout.places(batch)], atol=2e-5, rtol=0)


def test_layer_norms_that_came_from_tensorflow_have_other_names_in_the_file(tmp_path):
    theirs = saved(transformers.BertModel(transformers.BertConfig(**SIZES)), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    safetensors.torch.save_file(old | {"embeddings.position_ids": torch.arange(20)[None]}, path)
    recipe = a_recipe(tmp_path)
    report = fill(recipe.module().eval(), tmp_path)
    assert report.left == ["pooler.dense.bias", "pooler.dense.weight"]
    same_states(recipe.network, theirs, some_batch(View(), recipe.network.readers, some_samples(4)))


def same_picture(net, theirs_of, mean, deviation):
    pixels = noise(32, 32)
    tokens = View().row(sample(pixels), net.readers, Draw.row(0, 0, 0, epoch=0, unit=0), None)
    batch = pack([tokens], View().attend.plan)
    x = torch.tensor(pixels / 255, dtype=torch.float32).permute(2, 0, 1)
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(net(batch), theirs_of(x[None])[0], atol=1e-5, rtol=0)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("pixels", [None, ((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))])
def test_a_vit_of_transformers_gives_the_same_states_however_its_pixels_are_normalised(pixels, tmp_path):
    torch.manual_seed(0)
    theirs = saved(transformers.ViTModel(transformers.ViTConfig(**VIT)), tmp_path)
    if pixels:
        told = {"image_mean": pixels[0], "image_std": pixels[1]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    net = a_vit().eval()
    report = fill(nn.ModuleDict({"network": net}), tmp_path)
    assert report.missing == ["network.modalities.image.mask_D"]
    assert report.left == ["pooler.dense.bias", "pooler.dense.weight"]
    same_picture(net, lambda x: theirs(x).last_hidden_state, *pixels or IMAGENET)


def test_a_vit_of_timm_gives_the_same_states(tmp_path):
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4)
    theirs = timm.create_model("vit_tiny_patch16_224", **small).eval()
    vary(theirs)
    save_for_hf(theirs, tmp_path, model_args=small, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    net = a_vit().eval()
    report = fill(nn.ModuleDict({"network": net}), tmp_path)
    assert report.left == ["head.bias", "head.weight"]
    same_picture(net, theirs.forward_features, config["mean"], config["std"])


def test_maes_encoder_is_taken_and_its_fixed_positions_are_told(tmp_path):
    torch.manual_seed(0)
    small = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    saved(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**VIT, **small)), tmp_path)
    numbers = dict(width=32, depth=2, heads=4, decoder_width=16, decoder_depth=1, decoder_heads=2, patch_px=8)
    recipe = mae(**numbers, side_px=32)
    report = fill(recipe.module(), tmp_path)
    assert report.notes == ["network.modalities.image.places.table_PD has no place in the recipe"]
    assert all(name.startswith("decoder.") for name in report.left)
    assert any("decoder" in name for name in report.missing)


def test_a_network_of_many_files_and_under_another_name(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    vary(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    student, teacher = a_recipe(tmp_path), a_recipe(tmp_path)
    module = nn.ModuleDict({"network": student.network, "teacher": teacher.network, "head": student.module()["tasks"]})
    before = {name: tensor.clone() for name, tensor in student.network.state_dict().items()}
    told = Imported(str(tmp_path), into="teacher").fill(module.eval())
    assert all(torch.equal(before[name], tensor) for name, tensor in student.network.state_dict().items())
    same_states(teacher.network, theirs, some_batch(View(), teacher.network.readers, some_samples(4)))
    assert "keeps its first values, is not in it: network.modalities.text" in told
    assert "in it and not taken: pooler.dense.bias, pooler.dense.weight" in told


def test_heads_that_hang_on_another_network_keep_their_weights(tmp_path):
    saved(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), tmp_path)
    recipe = a_recipe(tmp_path)
    other = Vocabulary(nn.Embedding(65, 32))
    before = other.transform.dense.weight.clone()
    fill(nn.ModuleDict({"network": recipe.network, "own": recipe.module()["tasks"], "other": other}), tmp_path)
    assert torch.equal(other.transform.dense.weight, before)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(depth=3), r"does not fit: network.encoder.blocks.2.* is not in it"),
        (dict(depth=1), r"network.encoder.blocks.1.* has no place in the recipe"),
        (dict(heads=2), r"the recipe has 2 attention heads, theirs 4"),
        (dict(width=16), r"network.modalities.text.table.weight has shape \[65, 16\], theirs \[65, 32\]"),
        (dict(length=30), r"positions.weight has shape \[30, 32\], theirs \[20, 32\]"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_changed(numbers, message, tmp_path):
    saved(transformers.BertModel(transformers.BertConfig(**SIZES)), tmp_path)
    recipe = a_recipe(tmp_path, **numbers)
    before = {name: tensor.clone() for name, tensor in recipe.network.state_dict().items()}
    with pytest.raises(ImportedError, match=message):
        fill(recipe.module(), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in recipe.network.state_dict().items())


def test_another_kind_of_network_is_refused(tmp_path):
    saved(transformers.ViTModel(transformers.ViTConfig(**VIT)), tmp_path)
    with pytest.raises(ImportedError, match="is for the role 'image', the recipe's network has text"):
        fill(a_recipe(tmp_path).module(), tmp_path)
    saved(transformers.BertModel(transformers.BertConfig(**SIZES | dict(hidden_act="relu"))), tmp_path)
    with pytest.raises(ImportedError, match="its activation is relu, ours gelu"):
        fill(a_recipe(tmp_path).module(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ImportedError, match=r"nothing here knows the architecture 'gpt2'; known are bert, vit"):
        fill(a_recipe(tmp_path).module(), tmp_path)


def test_parts_that_would_make_it_another_function_are_not_left_out(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4,
                               init_values=0.1)  # fmt: skip
    save_for_hf(theirs, tmp_path, model_args=dict(embed_dim=32, num_heads=4), safe_serialization=True)
    with pytest.raises(ImportedError, match=r"parts that mmpre's networks have not: blocks.0.ls1.gamma"):
        fill(nn.ModuleDict({"network": a_vit()}), tmp_path)


def test_a_small_eps_is_told(tmp_path):
    saved(transformers.BertModel(transformers.BertConfig(**SIZES | dict(layer_norm_eps=1e-5))), tmp_path)
    report = fill(a_recipe(tmp_path).module(), tmp_path)
    assert "LayerNorms have eps 1e-12, theirs 1e-05: states will differ a little" in report.notes


def test_pickled_weights_are_not_opened_and_the_way_out_is_told(tmp_path):
    with pytest.raises(ImportedError, match=r"wanted a folder with config.json and safetensors"):
        fill(a_recipe(tmp_path).module(), tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ImportedError, match=r"Pickled files can run any code .* convert it once: python -c") as caught:
        fill(a_recipe(tmp_path).module(), tmp_path)
    command = str(caught.value).split('python -c "')[1].rsplit('"', 1)[0]
    torch.save({"a.b": torch.arange(3.0)}, tmp_path / "pytorch_model.bin")
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["a.b"].tolist() == [0, 1, 2]


def test_an_index_may_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ImportedError, match=r"names files that may not be: \['../other.safetensors'\]"):
        fill(a_recipe(tmp_path).module(), tmp_path)


def texts(folder):
    with webdataset.ShardWriter(str(folder / "t-%03d.tar"), verbose=0) as sink:
        for i in range(20):
            sink.write({"__key__": f"t{i:02d}", "txt": b"w1 w2 w3 w4 w5 w6 w7 w8"})
    return (str(folder / "t-000.tar"),)


def test_a_run_of_imported_weights_is_opened_and_trained(tmp_path):
    theirs = saved(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    numbers = dict(tokenizer=str(tmp_path / "tokenizer.json"), width=32, depth=2, heads=4, length=16, dropout=0.0,
                   batch=4, micro_batches=1, steps=2, warmup=1)  # fmt: skip
    report = import_model(tmp_path, "bert", out=tmp_path / "run", options=RunOptions(workers=0, exact=True), **numbers)
    assert report.left == []
    opened = mmpre.load(tmp_path / "run")
    assert opened.checkpoint.step == 0
    table = opened.recipe.network.modalities["text"].table.weight
    assert torch.equal(table, theirs.bert.embeddings.word_embeddings.weight)
    data = texts(tmp_path)
    mmpre.resume(tmp_path / "run", data=data)
    assert mmpre.load(tmp_path / "run").checkpoint.step == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"][0]["samples"] == 20
    with pytest.raises(RunError, match="no checkpoint at or before step 1 in its stage"):
        replay(tmp_path / "run", 1)  # which did not begin with the weights that a seed draws
    options = RunOptions(workers=0, exact=True, init=str(tmp_path))
    mmpre.train("bert", out=tmp_path / "other", options=options, data=data, **numbers)
    mine, other = (mmpre.load(tmp_path / name).recipe.network.state_dict() for name in ("run", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert not torch.equal(mine["modalities.text.table.weight"], theirs.bert.embeddings.word_embeddings.weight)
    with pytest.raises(RunError, match="init would change the results"):
        mmpre.resume(tmp_path / "other", init="elsewhere")
    with pytest.raises(RunError, match="already holds a run"):
        import_model(tmp_path, "bert", out=tmp_path / "run", **numbers)


def test_the_command_line_imports_and_tells_the_difference(tmp_path, capsys):
    saved(transformers.BertModel(transformers.BertConfig(**SIZES)), tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    main(["import", str(tmp_path), "bert", "--tokenizer", str(tmp_path / "tokenizer.json"), "--width", "32", "--depth",
          "2", "--heads", "4", "--length", "16"])  # fmt: skip
    told = capsys.readouterr().out
    assert f"{tmp_path} (bert): 29 tensors taken" in told
    assert "keeps its first values, is not in it: tasks.mlm.readouts.0.head.bias" in told
    assert "in it and not taken: pooler.dense.bias, pooler.dense.weight" in told
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path), "bert", "--width", "32", "--depth", "2", "--heads", "2"])
    assert "the recipe has 2 attention heads, theirs 4" in capsys.readouterr().err


SPEECH = dict(stack=2, channels=(), noise=0.0, width=32, depth=1, more_depth=1, heads=4, kernel=5, causal=True, codes=8,
              values=8, compare=8)  # fmt: skip


def test_a_model_of_speech_gives_the_states_of_its_class(tmp_path):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_depthwise_kernel_size=5,
        layerdrop=0.0,
    )  # fmt: skip
    model = saved(transformers.Wav2Vec2BertModel(config), tmp_path / "model")
    recipe = w2v_bert(**SPEECH)
    report = fill(recipe.module(), tmp_path / "model")
    assert report.family == "wav2vec2_bert" and report.left == [] and report.notes == []
    frame_nE = torch.randn(30, 160)
    tokens = Tokens.of_row(torch.full((30,), -1), frame=frame_nE)
    row = Row("a", {"speech": tokens}, {"speech": tokens}, {"speech": torch.zeros(30, dtype=torch.bool)}, {})
    states_ND = recipe.network.eval()(pack([row], Full().plan))
    wanted_1ND = model(input_features=frame_nE[None]).last_hidden_state
    torch.testing.assert_close(states_ND, wanted_1ND[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ImportedError, match="theirs has convolutions that look back alone, the recipe otherwise"):
        fill(w2v_bert(**SPEECH | dict(causal=False)).module(), tmp_path / "model")
    config.position_embeddings_type = "rotary"
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ImportedError, match=r"it has \{'position_embeddings_type': 'rotary'\}, ours"):
        fill(recipe.module(), tmp_path / "model")


@pytest.mark.parametrize("more", [{"pretrained": True}, {"checkpoint_path": "evil.pth"}])
def test_timm_is_told_nothing_of_a_file_but_a_models_name(tmp_path, monkeypatch, more):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4)
    save_for_hf(theirs, tmp_path, model_args={"img_size": 32, **more}, safe_serialization=True)
    asked, create = [], timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **told: asked.append((name, told)) or create(name, **told))
    fill(nn.ModuleDict({"network": a_vit()}), tmp_path)
    assert asked == []  # the number of heads stands in the file
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportedError, match="the recipe has 4 attention heads, theirs 3"):  # as a model of that name
        fill(nn.ModuleDict({"network": a_vit()}), tmp_path)
    assert asked == [("vit_tiny_patch16_224", {"pretrained": False})]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "hf-hub:someone/vit"}))
    with pytest.raises(ImportedError):
        fill(nn.ModuleDict({"network": a_vit()}), tmp_path)
    assert not any("hf-hub" in name for name, _ in asked)


def test_a_configuration_that_lacks_a_number_is_told(tmp_path):
    saved(transformers.BertModel(transformers.BertConfig(**SIZES)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "2"}))
    with pytest.raises(ImportedError, match=r"config\.json: num_hidden_layers must be a whole number, got '2'"):
        fill(a_recipe(tmp_path).module(), tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ImportedError, match=r"config\.json must hold an object, got list"):
        fill(a_recipe(tmp_path).module(), tmp_path)
