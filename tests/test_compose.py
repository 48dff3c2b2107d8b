"""GRAMMAR, section 1: composition, sentence by sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Desk, dig
from hypothesis import given
from hypothesis import strategies as st

from core.trees import drop_nulls, leaves, merge, put
from train_args import Config

PLUGIN = """
    from core.options import NoOptions
    from variations.norm import NORMS
    from variations.norm.none import NoNorm

    class Half(NoNorm):
        '''Formula: y = x / 2'''

        def forward(self, x):
            return x / 2

    NORMS["half"] = Half
"""

# defaults -------------------------------------------------------------------------------------------------------------------


def test_a_later_entry_wins_over_an_earlier_one(desk: Desk) -> None:
    desk.preset("one", "train: {max_iters: 1, batch_size: 1}")
    desk.preset("two", "train: {max_iters: 2}")
    assert desk.config("defaults: [presets/one, presets/two]").train.max_iters == 2
    assert desk.config("defaults: [presets/two, presets/one]").train.max_iters == 1
    assert desk.config("defaults: [presets/one, presets/two]").train.batch_size == 1, "what it does not say stays"


@pytest.mark.parametrize(
    ("entries", "winner"), [("presets/one, _self_", 7), ("_self_, presets/one", 1), ("presets/one", 7)]
)
def test_the_file_itself_stands_where_self_stands_and_else_last(desk: Desk, entries: str, winner: int) -> None:
    desk.preset("one", "train: {max_iters: 1}")
    assert desk.config(f"defaults: [{entries}]\ntrain: {{max_iters: 7}}").train.max_iters == winner


def test_presets_are_found_from_a_file_anywhere_and_from_beside_it_first(desk: Desk) -> None:
    desk.preset("quick", "train: {max_iters: 11}")
    file = desk.write("defaults: [presets/quick, _self_]", "deep/down/x.yaml")
    assert [run.config.train.max_iters for run in desk.listed(file.read_text(), name="deep/down/x.yaml").runs] == [11]
    desk.write("# @package _global_\ntrain: {max_iters: 12}", "deep/down/presets/quick.yaml")
    assert [run.config.train.max_iters for run in desk.listed(file.read_text(), name="deep/down/x.yaml").runs] == [12]


def test_presets_of_presets_and_neighbours_compose(desk: Desk) -> None:
    desk.preset("base", "train: {max_iters: 3, batch_size: 3}")
    desk.preset("more", "defaults: [base, _self_]\ntrain: {batch_size: 4}")
    desk.write("train: {seed: 5}", "beside.yaml")
    desk.write("train: {log_interval: 6}", "../above.yaml")
    train = desk.config("defaults: [presets/more, ./beside, ../above, _self_]").train
    assert (train.max_iters, train.batch_size, train.seed, train.log_interval) == (3, 4, 5, 6)


def test_a_preset_may_not_carry_a_sweep(desk: Desk) -> None:
    desk.preset("swept", "train: {seed: 1}\nsweep: {seeds: 2}")
    (told,) = desk.wrong("defaults: [presets/swept]")
    assert (
        "a preset may not carry a sweep" in told and "swept.yaml:3)" in told and "Move it to the file you run." in told
    )


def test_a_preset_without_its_header_is_told(desk: Desk) -> None:
    desk.write("train: {seed: 1}", str(desk.presets / "bare.yaml"))
    (told,) = desk.wrong("defaults: [presets/bare]")
    assert told.startswith("presets: unknown key") and "A preset begins with the line '# @package _global_'" in told


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ("[presets/quik]", "no file 'presets/quik' (x.yaml:1). Did you mean 'presets/quick'?"),
        ("[x]", "the files include one another without end, at 'x' (x.yaml:1)."),
        ("{presets: quick}", "is not a list of files (x.yaml:1)."),
        ("[5]", "Unsupported type in defaults : int (x.yaml:1)."),
        ('["presets/${oc.env:HOME}"]', "is not allowed in the names of files (x.yaml:1)."),
        ('["presets/${"]', "is not allowed in the names of files (x.yaml:1)."),
        ("[{override hydra/launcher: joblib}]", "Could not override 'hydra/launcher'"),
    ],
)
def test_a_defaults_list_that_cannot_be_is_a_sentence(desk: Desk, defaults: str, words: str) -> None:
    desk.preset("quick", "train: {seed: 1}")
    (told,) = desk.wrong(f"defaults: {defaults}")
    assert words in told and "__primary__" not in told


def test_a_missing_file_of_a_preset_is_placed_in_the_preset(desk: Desk) -> None:
    desk.preset("outer", "train: {seed: 1}\ndefaults: [inner]")
    (told,) = desk.wrong("defaults: [presets/outer]")
    assert "no file 'presets/inner'" in told and "outer.yaml:3)" in told


# Nodes ----------------------------------------------------------------------------------------------------------------------


def test_naming_a_variant_replaces_the_whole_node(desk: Desk) -> None:
    desk.preset("pkl", "model: {linear: {variant: pkl, scale: 0.25}, norm: {variant: rmsnorm, eps: 0.5}}")
    model = desk.config("defaults: [presets/pkl, _self_]\nmodel: {linear: {variant: pkl}, norm: layernorm}").model
    assert model.linear.options.scale == 1.0, "the same variant, named again, starts from its defaults"
    assert (model.norm.name, model.norm.options.eps) == ("layernorm", 1e-5)
    assert desk.config("defaults: [presets/pkl, _self_]\nmodel: {linear: standard}").model.linear.name == "standard"


def test_a_mapping_without_a_variant_merges_into_what_is_there(desk: Desk) -> None:
    desk.preset("pkl", "model: {linear: {variant: pkl, scale: 0.25}, norm: rmsnorm}")
    model = desk.config("defaults: [presets/pkl, _self_]\nmodel: {linear: {naive_init: true}, norm: {eps: 0.5}}").model
    assert (model.linear.name, model.linear.options.scale, model.linear.options.naive_init) == ("pkl", 0.25, True)
    assert (model.norm.name, model.norm.options.eps) == ("rmsnorm", 0.5)
    assert desk.config("model: {norm: {eps: 0.5}}").model.norm.name == "layernorm", "what is there may be the default"
    assert "model.norm.eps: unknown key" in desk.wrong("model: {norm: off}", "model.norm.eps=1.0")[0]


def test_a_rule_of_a_later_file_moves_to_its_place_and_a_variant_inside_one_replaces() -> None:
    base = {"slices": {"a": {"match": "x", "init": {"variant": "normal", "std": 1}}, "b": {"match": "y"}}}
    over = {"slices": {"a": {"lr_scale": 2, "init": {"variant": "zeros"}}, "variant": {"match": "z"}}}
    made = merge(base, over)
    assert list(made["slices"]) == ["b", "a", "variant"]
    assert made["slices"]["a"] == {"match": "x", "init": {"variant": "zeros"}, "lr_scale": 2}
    assert list(base["slices"]) == ["a", "b"], "what is merged is not changed"
    assert list(put(base, ("slices", "a", "lr_scale"), 3)["slices"]) == ["a", "b"], (
        "a value set by a sweep moves nothing"
    )


def test_null_removes_rules_sites_axes_and_cases(desk: Desk) -> None:
    assert drop_nulls({"slices": {"a": None, "b": {"match": "x"}}}) == {"slices": {"b": {"match": "x"}}}
    desk.preset("sites", "model: {sites: {plain: {match: head, head: standard}, gone: {match: ln_f, norm: none}}}")
    text = "defaults: [presets/sites, _self_]\nmodel: {sites: {gone: null}}"
    assert list(desk.config(text).model.sites) == ["plain"]
    assert list(desk.config(text, "~model.sites.plain").model.sites) == []
    sweep = "sweep: {grid: {train.seed: null, model.bias: [true, false]}, cases: {a: {}, b: null}, groups: {g: null}}"
    assert desk.cells(sweep) == ["a, bias=true", "a, bias=false"]
    assert desk.cells(sweep, "sweep.cases.a=null") == ["bias=true", "bias=false"]
    assert desk.cells("sweep: {cases: {a: {grid: {model.bias: null}}}}") == ["a"]
    assert desk.values("sweep: {grid: {model.sites.x: [null, {match: ln_f, norm: none}]}}", "model.sites")[0] == {}


def test_null_means_off_and_is_refused_where_a_field_cannot_be_off(desk: Desk) -> None:
    assert desk.config("train: {grad_clip: null}").train.grad_clip is None
    assert desk.config("model: {norm: null}").model.norm.name == "none"
    told = desk.wrong("model: {n_layer: null, linear: null}\ntrain: null")
    assert told[0] == "model.n_layer: null (off) is not possible here (x.yaml:1). It takes an integer."
    assert told[1].startswith(
        "model.linear: null (off) is not possible here (x.yaml:1). Known: pkl, quantised, standard"
    )
    assert told[2] == "train: null (off) is not possible here (x.yaml:2). It takes a mapping."


def test_off_is_a_word_or_a_boolean(desk: Desk) -> None:
    for off in ("off", '"off"', "false", "no"):
        config = desk.config(
            f"model: {{norm: {off}, position: {off}}}\ntrain: {{grad_clip: {off}}}\ntracking: {{wandb: {{mode: {off}}}}}"
        )
        assert config.tracking.wandb.mode == "off"
        assert (config.model.norm.name, config.model.position.name, config.train.grad_clip) == ("none", "none", None)
    config = desk.config("{}", "model.norm=off", "train.grad_clip=off", "tracking.wandb.mode=off")
    assert (config.model.norm.name, config.train.grad_clip, config.tracking.wandb.mode) == ("none", None, "off")
    (told,) = desk.wrong("model: {norm: off, linear: off}")
    assert told.startswith("model.linear: False is not possible here (x.yaml:1). Known: ")


def test_a_name_read_for_one_kind_is_not_taken_for_another(desk: Desk) -> None:
    config = desk.config("model: {linear: &same standard, mlp: *same}")
    assert type(config.model.mlp.options) is not type(config.model.linear.options)


TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.sampled_from(["a", "b"])),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
)


@given(TREES, TREES)
def test_merging_keeps_what_only_one_side_says_and_the_later_value_else(base: object, over: object) -> None:
    made = merge(base, over)
    if isinstance(over, dict) and isinstance(base, dict):
        assert set(made) == set(base) | set(over)
        for key in made:
            assert made[key] == (merge(base[key], over[key]) if key in base and key in over else {**base, **over}[key])
    elif not isinstance(over, dict):
        assert made == over
    if isinstance(over, dict):
        again = merge({}, over)
        assert all(merge(again, over)[k] == again[k] for k in over), "merging the same again changes nothing"
        for path, value in leaves(over):
            found = made
            for key in path:
                found = found[key]
            assert value == {} or found == value, "whatever the later one says holds"


# References -----------------------------------------------------------------------------------------------------------------


def test_references_resolve_per_run_after_the_sweep_has_set_its_values(desk: Desk) -> None:
    text = """
    model: {n_embd: 32, mlp: {width: "${model.n_embd}"}}
    train: {seed: "${.batch_size}"}
    tracking: {wandb: {project: "w${model.n_embd}-${train.seed}"}}
    sweep: {grid: {model.n_embd: [16, 64], train.batch_size: [1, 2]}}
    """
    runs = [run.config for run in desk.listed(text).runs]
    assert [(c.model.mlp.options.width, c.train.seed) for c in runs] == [(16, 1), (16, 2), (64, 1), (64, 2)]
    assert [c.tracking.wandb.project for c in runs] == ["w16-1", "w16-2", "w64-1", "w64-2"]


def test_a_reference_may_name_a_default_a_node_or_another_reference(desk: Desk) -> None:
    model = desk.config(
        """
        model:
          embedding: {variant: pkl, scale: 0.5}
          head: "${model.embedding}"
          mlp: {width: "${model.n_embd}"}
          n_kv_head: "${model.n_head}"
          linear: {variant: pkl, scale: "${model.head.scale}"}
          norm: {eps: "${model.embedding.scale}"}
        """
    ).model
    assert model.head == model.embedding and model.mlp.options.width == 128 and model.n_kv_head == 4
    assert model.linear.options.scale == 0.5 and model.norm.options.eps == 0.5


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("${oc.env:HOME}", "'${oc.env:HOME}' is not allowed (x.yaml:2). Only keys of the configuration"),
        ("${train.sead}", "'${train.sead}' names nothing (x.yaml:2). Did you mean 'train.seed'?"),
        ("${train.seed}", "'${train.seed}' refers to itself (x.yaml:2)."),
        ("${train.seed", "has a reference that does not close"),
        ("${}", "'${}' names nothing"),
    ],
)
def test_a_reference_that_cannot_be_is_one_sentence(desk: Desk, value: str, words: str) -> None:
    (told,) = desk.wrong(f'train:\n  seed: "{value}"')
    assert told.startswith("train.seed: ") and words in told


@pytest.mark.parametrize("form", ["['{0}', '{0}']", "'{0}{0}'"])
def test_references_that_multiply_are_refused(desk: Desk, form: str) -> None:
    lines = [f"    a{i}: {form.format(f'${{model.sites.a{i - 1}}}')}" for i in range(1, 30)]
    told = desk.wrong("\n".join(["model:", "  sites:", "    a0: x", *lines]))
    assert any("the references lead through too many others" in sentence for sentence in told)


def test_hydras_own_section_is_refused(desk: Desk) -> None:
    assert desk.wrong("hydra: {run: {dir: x}}")[0].startswith("hydra: unknown key (x.yaml:1).")
    assert "sets keys of the configuration, not files" in desk.wrong("{}", "hydra.run.dir=x")[0]


# Plugins --------------------------------------------------------------------------------------------------------------------


def test_a_plugin_adds_a_norm_that_is_swept_by_name(desk: Desk, catalogue: None) -> None:
    desk.write(PLUGIN, "deep/mine.py")
    text = "plugins: [mine.py]\nsweep: {grid: {model.norm: [half, layernorm]}}"
    listing = desk.listed(text, name="deep/x.yaml")
    assert [run.config.model.norm.name for run in listing.runs] == ["half", "layernorm"], "relative to the file"
    assert listing.tree["plugins"] == [str(desk.folder / "deep" / "mine.py")]
    assert "Did you mean 'half'?" in desk.wrong("plugins: [mine.py]\nmodel: {norm: hafl}", name="deep/x.yaml")[0]


def test_a_plugin_of_a_preset_lies_beside_the_preset_and_one_of_the_command_line_here(
    desk: Desk, catalogue: None
) -> None:
    desk.write(PLUGIN, str(desk.presets / "mine.py"))
    desk.preset("half", "plugins: [mine.py]\nmodel: {norm: half}")
    assert desk.config("defaults: [presets/half]").model.norm.name == "half"
    desk.write(PLUGIN.replace("half", "third"), "here.py")
    assert desk.config("{}", "plugins=[here.py]", "model.norm=third").model.norm.name == "third"


BROKEN = {
    "raise RuntimeError('no luck')": "mine.py failed in line 1 (x.yaml:1): RuntimeError: no luck.",
    "import sys\nsys.exit(3)": "mine.py failed in line 2 (x.yaml:1): SystemExit: 3.",
    "def f(:": "mine.py failed in line 1 (x.yaml:1): SyntaxError",
    "from variations.norm import NORMS\nNORMS['x'] = 3": "the norm 'x' is not a class (mine.py).",
    "from variations.norm import NORMS\nclass X:\n    Options = dict\nNORMS['x'] = X": "Options that are not a dataclass",
    "from dataclasses import dataclass\nfrom variations.norm import NORMS\nclass X:\n    @dataclass\n"
    "    class Options:\n        a: int\nNORMS['x'] = X": "has an option 'a' without a default",
    "from variations.norm import NORMS\nclass half:\n    pass\nNORMS['half'] = half": "the model cannot be built: TypeError",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_plugin_is_told(desk: Desk, catalogue: None, code: str) -> None:
    desk.write(code, "mine.py")
    (told,) = desk.wrong("plugins: [mine.py]\nmodel: {norm: half}")
    assert BROKEN[code] in told


def test_a_plugin_that_is_not_there_is_told(desk: Desk) -> None:
    desk.write("", "mine.py")
    (told,) = desk.wrong("train: {seed: 1}\nplugins: [main.py]")
    assert told == "plugins: there is no Python file 'main.py' (x.yaml:2). Did you mean 'mine.py'? Known: mine.py."
    assert desk.wrong("plugins: mine.py") == ["plugins: 'mine.py' is not a list of Python files (x.yaml:1)."]


# Lengths, names, scalars ----------------------------------------------------------------------------------------------------


def test_the_length_is_iterations_or_tokens(desk: Desk) -> None:
    assert desk.config("train: {max_iters: 7}").iterations == 7
    size = "model: {block_size: 10}\n"
    assert desk.config(size + "train: {max_tokens: 100, batch_size: 3}").iterations == 4, (
        "whole iterations that reach it"
    )
    assert desk.config("{}").iterations == 2000
    (told,) = desk.wrong("train: {max_tokens: 5, max_iters: 7}")
    assert told.startswith("train.max_tokens: max_iters is given too")


def test_times_are_iterations_or_fractions(desk: Desk) -> None:
    schedule = desk.config("schedule: {warmup_iters: 1, decay_iters: 1.0, min_lr_ratio: 0.2}").schedule.options
    assert (schedule.warmup_iters, schedule.decay_iters, schedule.min_lr_ratio) == (1, 1.0, 0.2)
    assert type(schedule.warmup_iters) is int and type(schedule.decay_iters) is float
    told = desk.wrong("schedule: {warmup_iters: 1.5, decay_iters: 20.0}")
    assert "schedule.warmup_iters: 1.5 is a fraction of the run and cannot exceed 1.0" in told[0]
    assert "schedule.decay_iters: 20.0" in told[1] and "write 20 for iterations" in told[1]
    assert desk.wrong("schedule: {min_lr_ratio: 1.5}") == ["schedule.min_lr_ratio: 1.5 is not <= 1.0 (x.yaml:1)."]


def test_the_seed_moves_both_streams_and_each_can_be_pinned(desk: Desk) -> None:
    assert desk.config("train: {seed: 5}").seeds == (5, 5)
    assert desk.config("train: {seed: 5, init_seed: 6}").seeds == (6, 5)
    assert desk.config("train: {seed: 5, data_seed: 0}").seeds == (5, 0)


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "2024", "_x", "x" * 100])
def test_a_name_is_letters_digits_and_three_signs(desk: Desk, name: str) -> None:
    assert desk.listed(f'name: "{name}"').name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "-x", "x" * 101, "a\\n"])
def test_another_name_is_refused(desk: Desk, name: str) -> None:
    (told,) = desk.wrong(f'name: "{name}"')
    assert told.startswith("name: ") and "letters, digits, '-', '_' and '.'" in told


def test_without_a_name_it_is_the_files_own(desk: Desk) -> None:
    listing = desk.listed("{}", name="deep/my.run-2.yaml")
    assert (listing.name, listing.folder) == ("my.run-2", Path("runs/my.run-2"))
    assert desk.listed("{}", "name=other").name == "other"
    (told,) = desk.wrong("{}", name="my run.yaml")
    assert told.startswith("name: 'my run' is not made of") and "my run.yaml" in told
    swept = 'name: "n${model.n_layer}"\nsweep: {grid: {model.n_layer: [1, 2]}}'
    assert desk.wrong(swept) == ["name: it must be one for all runs, not 'n1', 'n2' (x.yaml:1)."]
    assert desk.wrong("name: 2024") == ["name: 2024 is not text (x.yaml:1). Put it in quotes."]


def test_a_key_given_twice_in_one_mapping_is_an_error(desk: Desk) -> None:
    (told,) = desk.wrong("train:\n  seed: 1\n  batch_size: 2\n  seed: 1")
    assert told == "train.seed: the key is given twice, first at x.yaml:2 (x.yaml:4)."


def test_json_files_are_yaml(desk: Desk) -> None:
    tree = {"train": {"max_iters": 5, "grad_clip": None}, "optimizer": {"learning_rate": 1e-7}, "name": "a\u0062"}
    for indent in (None, 2, "\t"):
        listing = desk.listed(json.dumps(tree, indent=indent), name="x.json")
        (run,) = listing.runs
        assert (run.config.train.max_iters, run.config.optimizer.options.learning_rate) == (5, 1e-7)
        assert (run.config.train.grad_clip, listing.name) == (None, "ab")
    (told,) = desk.wrong('{\n\t"train": {\n\t\t"sead": 1\n\t}\n}', name="x.json")
    assert told.startswith("train.sead: unknown key (x.json:3). Did you mean 'seed'?")


def test_every_section_of_the_tree_can_be_named(desk: Desk) -> None:
    config = desk.config("{}")
    assert isinstance(config, Config) and dig(config, "optimizer.learning_rate") == 1e-3
