"""LoraConfig and the choice of modules, against PEFT on tiny models and error by error."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lora_kernels.config import _UNSUPPORTED, LoraConfig, validate_adapter_name
from lora_kernels.targets import match_target_modules

TINY_LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class Experts(nn.Module):
    """A numbered list inside a numbered list, and a second list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(self._layer() for _ in range(2))
        self.decoder = nn.Module()
        self.decoder.h = nn.ModuleList(self._layer() for _ in range(2))
        self.w1 = nn.Linear(4, 4)

    @staticmethod
    def _layer() -> nn.Module:
        layer = nn.Module()
        layer.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(4, 4), "w2": nn.Linear(4, 4)}) for _ in range(3)
        )
        return layer


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


MODELS = {
    "llama": lambda: LlamaForCausalLM(TINY_LLAMA),
    "classifier": lambda: LlamaForSequenceClassification(TINY_LLAMA),
    "experts": Experts,
    "sequential": sequential,
    "layers first": lambda: Experts().encoder,
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: make() for name, make in MODELS.items()}


@pytest.mark.parametrize(
    ("model_name", "kwargs"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["o_proj", "down_proj", "lm_head"]}),
        ("llama", {"target_modules": ["self_attn.k_proj", "model.layers.1.mlp.up_proj"]}),
        ("llama", {"target_modules": r".*\.layers\.[02]\..*(q|k)_proj"}),
        ("llama", {"target_modules": r"(?i).*Q_PROJ"}),
        ("llama", {"target_modules": "lm_head"}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": "All-Linear", "exclude_modules": ["mlp.up_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.1\..*"}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers"}),
        ("llama", {"target_modules": ["q_proj"], "exclude_modules": []}),
        ("llama", {"layers_to_transform": 1}),
        ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [2, 0]}),
        ("llama", {"target_modules": ["up_proj"], "layers_to_transform": []}),
        (
            "llama",
            {
                "target_modules": ["up_proj"],
                "layers_to_transform": [1],
                "layers_pattern": "layers",
            },
        ),
        (
            "llama",
            {
                "target_modules": ["up_proj", "model.layers.0.self_attn.q_proj"],
                "layers_to_transform": [1],
            },
        ),
        ("classifier", {"target_modules": "all-linear"}),
        ("classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("experts", {"target_modules": ["w1"]}),
        ("experts", {"target_modules": ["w1", "w2"], "layers_to_transform": 1}),
        ("experts", {"target_modules": ["w2"], "layers_to_transform": [1], "layers_pattern": "h"}),
        (
            "experts",
            {
                "target_modules": ["w2"],
                "layers_to_transform": [0],
                "layers_pattern": ["h", "layers"],
            },
        ),
        (
            "experts",
            {
                "target_modules": ["w2"],
                "layers_to_transform": [2],
                "layers_pattern": ["experts"],
            },
        ),
        ("experts", {"target_modules": r"decoder\.h\.0\.experts\.[12]\.w."}),
        ("layers first", {"target_modules": ["w1"], "layers_to_transform": 0}),
        ("sequential", {"target_modules": ["0"]}),
        ("sequential", {"target_modules": ["2.0"]}),
    ],
    ids=repr,
)
def test_targets_are_those_of_peft(models, model_name, kwargs):
    model = models[model_name]
    peft_model = peft.LoraModel(copy.deepcopy(model), peft.LoraConfig(**kwargs), "default")
    names = match_target_modules(model, LoraConfig(**kwargs))
    assert sorted(names) == sorted(peft_model.targeted_module_names)
    assert names == [name for name, _ in model.named_modules() if name in names]


@pytest.mark.parametrize(
    ("model_name", "kwargs", "error"),
    [
        ("llama", {"target_modules": ".*q_pro"}, ValueError),
        ("llama", {"target_modules": ["proj"]}, ValueError),
        ("sequential", {"target_modules": r"\d"}, TypeError),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 7}, ValueError),
    ],
    ids=repr,
)
def test_neither_peft_adapts_these(models, model_name, kwargs, error):
    with pytest.raises(ValueError):
        peft.LoraModel(copy.deepcopy(models[model_name]), peft.LoraConfig(**kwargs), "default")
    with pytest.raises(error, match=r"^(target_modules|layers_to_transform)"):
        match_target_modules(models[model_name], LoraConfig(**kwargs))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_are_those_of_peft(models, use_rslora):
    kwargs = {
        "r": 6,
        "lora_alpha": 20,
        "target_modules": "all-linear",
        "use_rslora": use_rslora,
        "rank_pattern": {
            "model.layers.0.self_attn.q_proj": 2,
            r"layers\.\d\.self_attn\.[qk]_proj": 3,
            "q_proj": 4,
            "(up|down)_proj": 5,
            "1.mlp.gate_proj": 7,
        },
        "alpha_pattern": {r".*\.2\..*": 1.5, "k_proj": 9, "proj|v_proj": 11},
    }
    peft_model = peft.LoraModel(
        copy.deepcopy(models["llama"]), peft.LoraConfig(**kwargs), "default"
    )
    config = LoraConfig(**kwargs)
    names = match_target_modules(models["llama"], config)
    assert len(names) == 21
    ranks = set()
    for name in names:
        layer = peft_model.model.get_submodule(name)
        assert config.rank_for(name) == layer.r["default"], name
        assert config.alpha_for(name) == layer.lora_alpha["default"], name
        assert config.scaling_for(name) == layer.scaling["default"], name
        ranks.add(config.rank_for(name))
    assert ranks == {2, 3, 4, 5, 6, 7} - {4}


def test_scaling_and_pattern_order():
    config = LoraConfig(r=4, lora_alpha=6, rank_pattern={"b": 9, "a.b": 16})
    assert config.scaling_for("x") == 6 / 4
    assert config.rank_for("a.b") == 9
    assert config.rank_for("ab") == 4
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling_for("x") == 3.0
    reordered = LoraConfig(rank_pattern={"a.b": 16, "b": 9})
    assert reordered.rank_for("a.b") == 16
    again = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.rank_for("a.b") == 9
    assert LoraConfig.from_dict(reordered.to_dict()).rank_for("a.b") == 16


def test_many_patterns_are_not_compiled_again_for_every_module():
    names = [f"model.layers.{i}.{j}_proj" for i in range(100) for j in "qkvougd"]
    config = LoraConfig(rank_pattern={name: i + 1 for i, name in enumerate(names)})
    assert [config.rank_for(name) for name in names] == list(range(1, 701))


def test_fields_and_defaults_are_those_of_peft():
    ours = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}
    theirs = peft.LoraConfig().to_dict()
    assert ours.pop("extra") == {}
    assert ours == {name: theirs[name] for name in ours}
    assert {name: theirs[name] for name in _UNSUPPORTED} == _UNSUPPORTED
    # What is left neither changes the adapter by itself nor needs support.
    assert set(theirs) - set(ours) - set(_UNSUPPORTED) == {
        "auto_mapping",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
    }


def test_names_keep_their_order_and_lose_duplicates():
    config = LoraConfig(
        target_modules=("v", "q", "v"), exclude_modules={"b", "a"}, layers_to_transform=(3, 1, 3)
    )
    assert config.target_modules == ["v", "q"]
    assert config.exclude_modules == ["a", "b"]
    assert config.layers_to_transform == [3, 1]


def test_dict_round_trip_with_peft():
    theirs = peft.LoraConfig(
        r=5,
        target_modules=["q_proj", "k_proj"],
        exclude_modules=["layers.0.self_attn.q_proj"],
        lora_alpha=7.5,
        lora_dropout=0.1,
        use_rslora=True,
        init_lora_weights="gaussian",
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"k_proj": 2.5},
        task_type="CAUSAL_LM",
        base_model_name_or_path="somewhere",
        revision="main",
        inference_mode=True,
    ).to_dict()
    config = LoraConfig.from_dict(theirs)
    back = config.to_dict()
    assert list(back) == sorted(back)
    assert json.loads(json.dumps(back)) == back
    assert {**back, "target_modules": set(back["target_modules"])} == {
        **theirs,
        "exclude_modules": back["exclude_modules"],
    }
    assert set(back["exclude_modules"]) == theirs["exclude_modules"]
    assert LoraConfig.from_dict(back) == config
    assert peft.LoraConfig(**back) == peft.LoraConfig(**theirs)


def test_unknown_keys_are_kept_and_nothing_is_shared():
    content = {"r": 2, "from_the_future": {"a": [1]}, "extra": 3, "rank_pattern": None}
    config = LoraConfig.from_dict(content)
    assert config.extra == {"from_the_future": {"a": [1]}, "extra": 3}
    written = config.to_dict()
    assert written["from_the_future"] == {"a": [1]}
    assert written["extra"] == 3
    assert written["peft_type"] == "LORA"
    assert written["rank_pattern"] == {}
    written["from_the_future"]["a"].append(2)
    content["from_the_future"]["a"].append(3)
    assert config.extra["from_the_future"] == {"a": [1]}


NON_DEFAULT = {
    "target_parameters": ["weight"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "ensure_weight_tying": True,
    "megatron_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"a": 1},
    "lora_ga_config": {"a": 1},
    "velora_config": {"a": 1},
    "kasa_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
}


@pytest.mark.parametrize("name", _UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(name):
    for harmless in (_UNSUPPORTED[name], copy.copy(_UNSUPPORTED[name])):
        LoraConfig.from_dict({name: harmless})
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        LoraConfig.from_dict({name: NON_DEFAULT[name]})


@pytest.mark.parametrize(
    "settings",
    [
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"lora_bias": True, "init_lora_weights": False},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_what_peft_writes_of_an_option_is_what_we_write(settings):
    theirs = peft.LoraConfig(**settings).to_dict()
    config = LoraConfig.from_dict(json.loads(json.dumps(theirs)))
    assert {name: config.to_dict()[name] for name in settings} == settings
    assert peft.LoraConfig(**config.to_dict()) == peft.LoraConfig(**theirs)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("r", "8", TypeError),
        ("r", 8.0, TypeError),
        ("r", True, TypeError),
        ("r", None, TypeError),
        ("r", 0, ValueError),
        ("r", -1, ValueError),
        ("lora_alpha", "16", TypeError),
        ("lora_alpha", True, TypeError),
        ("lora_alpha", math.nan, ValueError),
        ("lora_alpha", math.inf, ValueError),
        ("lora_alpha", 10**400, ValueError),
        ("lora_dropout", "0", TypeError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", 1, ValueError),
        ("lora_dropout", math.nan, ValueError),
        ("use_rslora", 1, TypeError),
        ("inference_mode", None, TypeError),
        ("init_lora_weights", "pissa_niter_x", ValueError),
        ("init_lora_weights", "pissa_niter_65", ValueError),
        ("lora_alpha", 1e39, ValueError),
        ("init_lora_weights", "loftq", ValueError),
        ("bias", "some", ValueError),
        ("bias", None, ValueError),
        ("modules_to_save", "lm_head", TypeError),
        ("modules_to_save", [""], ValueError),
        ("modules_to_save", [1], TypeError),
        ("use_dora", 1, TypeError),
        ("lora_bias", "yes", TypeError),
        ("fan_in_fan_out", None, TypeError),
        ("init_lora_weights", "eva", ValueError),
        ("init_lora_weights", None, ValueError),
        ("init_lora_weights", 1, ValueError),
        ("target_modules", 3, TypeError),
        ("target_modules", {"q_proj": 1}, TypeError),
        ("target_modules", ["q_proj", 3], TypeError),
        ("target_modules", [], ValueError),
        ("target_modules", "", ValueError),
        ("target_modules", [""], ValueError),
        ("target_modules", "(", ValueError),
        ("target_modules", "a{99999999999999999999}", ValueError),
        ("exclude_modules", 3, TypeError),
        ("exclude_modules", [None], TypeError),
        ("exclude_modules", [""], ValueError),
        ("exclude_modules", "*", ValueError),
        ("layers_to_transform", "1", TypeError),
        ("layers_to_transform", 1.0, TypeError),
        ("layers_to_transform", True, TypeError),
        ("layers_to_transform", [0, "1"], TypeError),
        ("layers_to_transform", -1, ValueError),
        ("layers_to_transform", [0, -1], ValueError),
        ("layers_pattern", "layers", ValueError),
        ("layers_pattern", 3, TypeError),
        ("layers_pattern", [3], TypeError),
        ("rank_pattern", ["q_proj"], TypeError),
        ("rank_pattern", None, TypeError),
        ("rank_pattern", {1: 2}, TypeError),
        ("rank_pattern", {"q_proj": 2.0}, TypeError),
        ("rank_pattern", {"q_proj": True}, TypeError),
        ("rank_pattern", {"q_proj": 0}, ValueError),
        ("rank_pattern", {"[": 1}, ValueError),
        ("rank_pattern", {"(?i)q_proj": 1}, ValueError),
        ("alpha_pattern", "q_proj", TypeError),
        ("alpha_pattern", {"q_proj": "2"}, TypeError),
        ("alpha_pattern", {"q_proj": True}, TypeError),
        ("alpha_pattern", {"q_proj": math.inf}, ValueError),
        ("alpha_pattern", {"(": 1}, ValueError),
        ("task_type", 1, TypeError),
        ("task_type", "CAUSAL", ValueError),
        ("base_model_name_or_path", 1, TypeError),
        ("revision", 1, TypeError),
        ("extra", [], TypeError),
    ],
)
def test_each_field_is_checked(name, value, error):
    with pytest.raises(error, match=rf"^{name}\b.*: expected .*, got ") as caught:
        LoraConfig(**{name: value})
    assert caught.type is error


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": 0, "layers_pattern": "("}, "layers_pattern"),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "(?i)h"]}, "layers_pattern"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "init_lora_weights"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_contradictions(kwargs, name):
    if name != "layers_pattern" or "target_modules" in kwargs:
        with pytest.raises(ValueError):
            peft.LoraConfig(**kwargs)
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        LoraConfig(**kwargs)


def test_from_dict_wants_a_lora_config():
    with pytest.raises(ValueError, match=r"^peft_type: expected 'LORA', got 'IA3'"):
        LoraConfig.from_dict({"peft_type": "IA3"})
    with pytest.raises(TypeError, match="adapter config: expected a dict"):
        LoraConfig.from_dict([("r", 8)])
    with pytest.raises(TypeError, match="adapter config: expected a dict"):
        LoraConfig.from_dict({8: "r"})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, ValueError, r"\['q_prj'\].*22 nn.Linear"),
        ({"target_modules": "q_proj"}, ValueError, r"'q_proj'.*regular expression.*0.self_attn.q"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ".*"},
            ValueError,
            r"'q_proj'.*exclude_modules='\.\*'",
        ),
        ({"target_modules": ["self_attn"]}, TypeError, "layers.0.self_attn'.*LlamaAttention"),
        ({"target_modules": r".*layers\.0\.mlp.*"}, TypeError, "layers.0.mlp'.*LlamaMLP"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, "k_proj": 3}},
            ValueError,
            r"^rank_pattern: .*\['k_proj'\]",
        ),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"q_pro": 2}},
            ValueError,
            r"^alpha_pattern: .*\['q_pro'\]",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 3, 7]},
            ValueError,
            r"^layers_to_transform: .*\[3, 7\]",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
            ValueError,
            r"^layers_to_transform: .*\[0\]",
        ),
    ],
    ids=repr,
)
def test_targets_that_select_nothing(models, kwargs, error, message):
    with pytest.raises(error, match=message):
        match_target_modules(models["llama"], LoraConfig(**kwargs))


def test_default_targets(models):
    peft_defaults = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    model = copy.deepcopy(models["llama"])
    for model_type in ("mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"):
        model.config.model_type = model_type
        names = match_target_modules(model, LoraConfig())
        assert names == match_target_modules(
            model, LoraConfig(target_modules=peft_defaults[model_type])
        )
        assert len(names) == 6
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match=r"^target_modules: .*'unheard_of'"):
        match_target_modules(model, LoraConfig())
    with pytest.raises(ValueError, match=r"^target_modules: .*None"):
        match_target_modules(models["experts"], LoraConfig())


def test_an_exclusion_without_effect_warns(models):
    with pytest.warns(UserWarning, match="exclude_modules=.*k_prj"):
        match_target_modules(models["llama"], LoraConfig(exclude_modules=["k_prj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_target_modules(models["llama"], LoraConfig(exclude_modules=["k_proj"]))


def test_the_inside_of_a_linear_is_not_looked_at():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_A = nn.ParameterDict({"default": torch.zeros(1, 4)})
            self.inner = nn.Linear(4, 4)

    model = nn.ModuleDict({"q_proj": Adapted(), "q_proj2": nn.Linear(4, 4)})
    for target in ("all-linear", "q_proj.*"):
        assert match_target_modules(model, LoraConfig(target_modules=target)) == [
            "q_proj",
            "q_proj2",
        ]


@pytest.mark.parametrize("name", ["default", "b", "A-1_x", "_x", "0", "x" * 100, "base"])
def test_adapter_names(name):
    validate_adapter_name(name)
    nn.ParameterDict({name: torch.zeros(1)})


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a.b", "a/b", "a\\b", "-a", "a b", "a\n", "ä", "x" * 101, "__base__"),
        *("keys", "values", "items", "pop", "update", "training", "get", "forward", "_keys"),
    ],
)
def test_adapter_names_that_are_refused(name):
    with pytest.raises(ValueError, match=r"^adapter_name: expected "):
        validate_adapter_name(name)


def test_adapter_names_are_strings():
    with pytest.raises(TypeError, match=r"^adapter_name: expected a str, got 1"):
        validate_adapter_name(1)


def test_importing_needs_neither_transformers_nor_peft():
    code = (
        "import sys, lora_kernels.config, lora_kernels.adapter_files;"
        "print(*{'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
