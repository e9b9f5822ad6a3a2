"""Settings come down one road, mistakes name their source, and tokens never come out again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import Config, EvaluateConfig, SweepConfig, load, mask_password
from ray_sql.errors import ConfigError

REQUIRED = ["--model_name", "m", "--output_name", "o", "--task_type", "sql"]


def settings(*flags: str, **overrides: Any) -> Config:
    return load(Config, [*REQUIRED, *flags], **overrides)


def refusal(*flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(*flags)
    return str(caught.value)


def yaml_file(folder: Path, text: str, name: str = "a.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_original_command_line_means_what_it_meant() -> None:
    flags = [*REQUIRED, "--read_token", "hf_r", "--write_token", "hf_w"]
    config = load(Config, flags)
    assert config.read_token and config.read_token.get_secret_value() == "hf_r"
    assert config.write_token and config.write_token.get_secret_value() == "hf_w"
    assert (config.dataset_id, config.prev_checkpoint) == (
        "NESPED-GEN/spider_selector_schemaReduzido",
        None,
    )
    assert (
        config.seed,
        config.train_batch_size,
        config.eval_batch_size,
        config.grad_accum_steps,
    ) == (14, 1, 1, 8)
    assert (config.learning_rate, config.num_epochs, config.save_steps) == (1e-4, 1, 250)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (64, 128, 0.1)
    assert (config.lora.target_modules, config.quantization.bnb_4bit_quant_type) == (
        "all-linear",
        "nf4",
    )
    assert config.quantization.load_in_4bit and not config.quantization.bnb_4bit_use_double_quant


def test_all_nine_optional_flags_of_the_original_are_read() -> None:
    flags = "--dataset_id d --prev_checkpoint checkpoint-9 --seed 1 --train_batch_size 2 "
    flags += "--eval_batch_size 3 --grad_accum_steps 4 --learning_rate 5e-5 --num_epochs 6 "
    flags += "--save_steps 7"
    public = settings(*flags.split()).public()
    given = {
        "dataset_id": "d",
        "prev_checkpoint": "checkpoint-9",
        "seed": 1,
        "train_batch_size": 2,
        "eval_batch_size": 3,
    }
    given |= {"grad_accum_steps": 4, "learning_rate": 5e-5, "num_epochs": 6, "save_steps": 7}
    assert {name: public[name] for name in given} == given


def test_a_setting_that_takes_several_takes_them_as_words_too() -> None:
    for flags in (
        ["seen", "unseen"],
        ["seen,unseen"],
        ["seen", "--split", "unseen"],
        ['["seen", "unseen"]'],
    ):
        config = settings("--split", *flags, "--dry_run", "--seed", "3")
        assert (config.split, config.dry_run, config.seed) == (("seen", "unseen"), True, 3)
    assert "--no_such: unknown flag" in refusal("--split", "seen", "--no_such")
    assert "stray" in refusal("--seed", "3", "stray")


def test_defaults_give_way_to_yaml_yaml_to_the_environment_and_the_environment_to_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yaml_file(
        tmp_path, "lora: {r: 8, lora_alpha: 9}\ntracking: {uri: sqlite:///file.db}\nseed: 3\n"
    )
    assert settings().tracking.uri is None
    assert settings("--config", file).tracking.uri == "sqlite:///file.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert settings("--config", file).tracking.uri == "http://environment:5000"
    config = settings("--config", file, "--tracking.uri", "http://flag:5000", "--lora.r", "32")
    assert config.tracking.uri == "http://flag:5000"
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout, config.seed) == (
        32,
        9,
        0.1,
        3,
    )


def test_a_later_file_lies_over_an_earlier_one_key_by_key(tmp_path: Path) -> None:
    first = yaml_file(tmp_path, "lora: {r: 8, lora_alpha: 9}\nseed: 1\n")
    second = yaml_file(tmp_path, "lora.r: 16\nseed: 2\n", "b.yaml")
    config = settings("--config", first, "--config", second)
    assert (config.lora.r, config.lora.lora_alpha, config.seed) == (16, 9, 2)
    assert settings("--config", second, "--config", first).lora.r == 8


def test_lists_switches_and_maps_are_read_from_flags() -> None:
    config = settings(
        "--split",
        "seen,unseen",
        "--no-tracking.enabled",
        "--dry_run",
        "--data.columns",
        "question=q",
    )
    assert config.split == ("seen", "unseen")
    assert config.dry_run and not config.tracking.enabled
    assert config.data.columns == {"question": "q"}


def test_a_section_without_settings_is_empty_and_one_with_a_value_is_explained(
    tmp_path: Path,
) -> None:
    file = yaml_file(tmp_path, "evaluate:\n# semantics: bird\nlora:\n  r: 8\n")
    assert settings("--config", file).evaluate == settings().evaluate
    assert "lora: 8 given, but it is a section; set lora.r, lora.lora_alpha" in refusal(
        "--config", yaml_file(tmp_path, "lora: 8\n")
    )


@pytest.mark.parametrize(
    "words",
    ["--num_epochs inf", "--learning_rate nan", "--evaluate.timeout inf", "--train.max_steps 0"],
)
def test_numbers_that_mean_nothing_are_refused(words: str) -> None:
    message = refusal(*words.split())
    assert message.startswith(words.split()[0]) and "\n" not in message


@pytest.mark.parametrize(
    "words", ["--tracking.enabled false", "--tracking.enabled=False", "--no-tracking.enabled"]
)
def test_a_switch_is_turned_off_in_whichever_way_one_writes_it(words: str) -> None:
    config = settings(*words.split(), "--overwrite", "true", "--dry_run", "--train.bf16", "false")
    assert (config.tracking.enabled, config.overwrite, config.dry_run, config.train.bf16) == (
        False,
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--learning_rat", "--learning_rate"),
        ("--lora.rr", "--lora.r"),
        ("--max_length", "--rows.max_length"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_known_one(flag: str, nearest: str) -> None:
    message = refusal(flag, "1")
    assert message.startswith(f"{flag}: ") and message.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_is_refused_with_its_file_and_the_nearest_known_one(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "lora: {rank: 8}\nsede: 3\nzzz: 1\n")
    lines = refusal("--config", file).splitlines()
    assert f"{file}: sede: unknown setting; did you mean seed?" in lines
    assert f"{file}: zzz: unknown setting; --help lists all" in lines
    assert any(line.startswith(f"{file}: lora.rank: unknown setting") for line in lines)


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("learning_rate", "-0.1", "greater than 0"),
        ("learning_rate", "fast", "valid number"),
        ("train_batch_size", "0", "greater than or equal to 1"),
        ("task_type", "sqll", "'sql' or 'schema'"),
        ("output_name", "a/b", "match pattern"),
        ("data.validation_fraction", "1.5", "less than 1"),
        ("rows.too_long", "cut", "'error', 'trim_schema' or 'drop'"),
        ("evaluate.max_new_tokens", "0", "greater than or equal to 1"),
        ("scaling.num_workers", "-1", "from 0 to 10000"),
    ],
)
def test_a_bad_value_is_named_by_its_flag_with_what_was_given_and_what_is_allowed(
    flag: str, value: str, allowed: str
) -> None:
    message = refusal(f"--{flag}", value)
    assert message.startswith(f"--{flag}: ") and "\n" not in message
    assert value in message and allowed in message


def test_a_bad_value_is_named_by_its_file_and_key(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "lora: {r: 0}\nseed:\n")
    lines = refusal("--config", file).splitlines()
    assert f"{file}: lora.r: 0 given; input should be greater than or equal to 1" in lines
    assert any(line.startswith(f"{file}: seed: None given; ") for line in lines)


@pytest.mark.parametrize(
    ("text", "reason"), [("lora: [", "not valid YAML"), ("- 1\n", "must hold `setting: value`")]
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str, reason: str) -> None:
    file = yaml_file(tmp_path, text)
    message = refusal("--config", file)
    assert message.startswith(f"--config {file}") and reason in message and "\n" not in message


def test_a_missing_file_and_a_missing_flag_are_named(tmp_path: Path) -> None:
    assert refusal("--config", str(tmp_path / "no.yaml")).startswith(
        f"--config {tmp_path}/no.yaml: cannot be read"
    )
    with pytest.raises(ConfigError, match=r"^--task_type is required: "):
        load(Config, ["--model_name", "m", "--output_name", "o"])


def test_settings_that_contradict_each_other_are_refused_with_both() -> None:
    message = refusal("--prompt.example_values", "3")
    assert "prompt.example_values is 3" in message and "--prompt.serializer m_schema" in message
    with pytest.raises(ConfigError, match="schema_form tables shows the answer"):
        load(
            Config,
            [
                "--model_name",
                "m",
                "--output_name",
                "o",
                "--task_type",
                "schema",
                "--prompt.schema_form",
                "tables",
            ],
        )


def test_the_resolved_settings_can_be_fed_back(tmp_path: Path) -> None:
    config = settings(
        "--lora.r",
        "8",
        "--split",
        "a,b",
        "--data.columns",
        "query=sql",
        "--train.global_batch_size",
        "6",
    )
    (tmp_path / "config.json").write_text(json.dumps(config.public()))
    again = load(Config, ["--config", str(tmp_path / "config.json")])
    assert again.public() == config.public()
    assert again.identity() == config.identity()


def test_a_run_of_a_given_global_batch_can_be_fed_back_with_another_number_of_workers(
    tmp_path: Path,
) -> None:
    config = settings("--train.global_batch_size", "8")
    file = yaml_file(tmp_path, json.dumps(config.public()), "config.json")
    again = load(Config, ["--config", file, "--scaling.num_workers", "2"])
    assert (again.accumulation_steps, again.batching.global_batch_size, again.identity()) == (
        4,
        8,
        config.identity(),
    )


@pytest.mark.parametrize("token", ["read_token", "write_token"])
def test_no_token_is_ever_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    config = settings(f"--{token}", "hf_flag")
    shown = [
        config.public(),
        config,
        repr(config),
        config.model_dump(),
        config.model_dump_json(),
        vars(config),
    ]
    shown += [config.changed({"seed": 2}), config.identity()]
    assert not [text for text in map(str, shown) if "hf_flag" in text or "hf_environment" in text]
    assert getattr(config, token).get_secret_value() == "hf_flag"


def test_a_refused_token_is_not_repeated(tmp_path: Path) -> None:
    message = refusal("--config", yaml_file(tmp_path, "read_token: [hf_secret]\n"))
    assert "read_token: a secret given" in message and "hf_secret" not in message


def test_the_environments_token_serves_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    config = settings()
    assert config.read_token and config.write_token
    assert config.read_token.get_secret_value() == config.write_token.get_secret_value() == "hf_x"


def test_a_change_is_validated_and_keeps_all_else_and_the_tokens() -> None:
    config = settings("--read_token", "hf_x", "--lora.r", "8")
    changed = config.changed({"lora.lora_alpha": 4, "seed": 1})
    assert (changed.lora.r, changed.lora.lora_alpha, changed.seed) == (8, 4, 1)
    assert changed.read_token == config.read_token and config.seed == 14
    with pytest.raises(ConfigError, match=r"^lora.r: 0 given; .*greater than or equal to 1$"):
        config.changed({"lora.r": 0})
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        config.changed({"learning_rates": 1})


@pytest.mark.parametrize(
    "flags",
    [
        "--output_dir elsewhere --cache_dir /tmp/c",
        "--data.databases /mnt/databases",
        "--scaling.storage_path s3://bucket/runs --scaling.max_failures 9",
        "--output_name other --overwrite",
        "--evaluate.limit 3 --split seen --eval_batch_size 9",
        "--train_batch_size 2 --grad_accum_steps 4",
        "--scaling.num_workers 2 --grad_accum_steps 4",
        "--train.global_batch_size 8",
        "--scaling.num_workers 1,2 --grad_accum_steps 4 "
        "--scaling.elastic_resize_monitor_interval_s 5",
        "--tracking.uri http://x --read_token hf_x",
    ],
)
def test_where_things_lie_and_how_a_batch_is_made_up_do_not_change_the_identity(flags: str) -> None:
    assert settings(*flags.split()).identity() == settings().identity()


@pytest.mark.parametrize(
    "flags",
    [
        "--model_name n",
        "--dataset_id d",
        "--seed 1",
        "--learning_rate 2e-4",
        "--num_epochs 2",
        "--lora.r 8",
        "--prompt.serializer compact",
        "--rows.max_length 99",
        "--data.split_by question",
        "--quantization.bnb_4bit_use_double_quant",
        "--train.weight_decay 0.5",
        "--grad_accum_steps 4",
        "--task_type schema",
    ],
)
def test_what_shapes_the_adapter_changes_the_identity(flags: str) -> None:
    assert settings(*flags.split()).identity() != settings().identity()


def test_a_global_batch_decides_the_accumulation_or_is_refused_with_the_numbers() -> None:
    config = settings(
        "--train.global_batch_size", "12", "--train_batch_size", "2", "--scaling.num_workers", "3"
    )
    assert (config.accumulation_steps, config.batching.global_batch_size) == (2, 12)
    message = refusal("--train.global_batch_size", "10", "--train_batch_size", "4")
    assert (
        "10 does not divide by train_batch_size 4 x 1 workers = 4" in message
        and "multiple of 4" in message
    )
    message = refusal("--train.global_batch_size", "8", "--grad_accum_steps", "3")
    assert "needs grad_accum_steps 8, but 3 was given" in message
    assert (
        settings(
            "--train.global_batch_size", "8", "--grad_accum_steps", "8"
        ).batching.global_batch_size
        == 8
    )


def test_an_elastic_run_has_two_bounds_and_one_batch(tmp_path: Path) -> None:
    for given in (
        settings("--scaling.num_workers", "1,4", "--train.global_batch_size", "24"),
        settings(
            "--config",
            yaml_file(tmp_path, "scaling: {num_workers: [1, 4]}\ntrain: {global_batch_size: 24}\n"),
        ),
    ):
        assert given.scaling.num_workers == (1, 4) and given.scaling.elastic
        assert (
            given.scaling.min_workers,
            given.scaling.max_workers,
            given.batching.global_batch_size,
        ) == (1, 4, 24)
        assert (
            load(Config, ["--config", yaml_file(tmp_path, json.dumps(given.public()))]).scaling
            == given.scaling
        )
    most = settings(
        "--scaling.num_workers", "1,2", "--train_batch_size", "2", "--grad_accum_steps", "3"
    )
    assert most.batching.global_batch_size == 2 * 3 * 2, "that of the largest number of workers"
    fixed = settings("--scaling.num_workers", "4")
    assert not fixed.scaling.elastic and fixed.scaling.min_workers == fixed.scaling.max_workers == 4


@pytest.mark.parametrize("bounds", ["4,1", "2,2", "0,2", "1,2,3", "a,2", "1.5", "-1"])
def test_bounds_that_are_none_are_refused_with_an_example(bounds: str) -> None:
    message = refusal("--scaling.num_workers", bounds)
    assert message.startswith(f"--scaling.num_workers: '{bounds}' given; ") and message.endswith(
        "first: 1,4"
    )


def test_a_batch_that_not_every_number_of_workers_divides_is_refused_with_one_that_is() -> None:
    message = refusal(
        "--scaling.num_workers", "1,4", "--train_batch_size", "2", "--grad_accum_steps", "8"
    )
    assert "a step of 64 examples does not divide by train_batch_size 2 x 3 workers" in message
    assert "set train.global_batch_size to a multiple of 24, as 72, or narrow the bounds" in message
    near = settings(
        "--scaling.num_workers", "1,4", "--train_batch_size", "2", "--train.global_batch_size", "72"
    )
    assert near.batching.global_batch_size == 72
    message = refusal("--scaling.num_workers", "2,5", "--train.global_batch_size", "20")
    assert "train_batch_size 1 x 3 workers" in message and "a multiple of 60, as 60" in message
    message = refusal(
        "--scaling.num_workers", "1,2", "--train.global_batch_size", "8", "--grad_accum_steps", "4"
    )
    assert "leave it unset" in message


def test_a_sweeps_trials_have_a_fixed_number_of_workers() -> None:
    flags = [
        "--model_name",
        "m",
        "--output_name",
        "o",
        "--task_type",
        "sql",
        "--scaling.num_workers",
        "1,2",
    ]
    with pytest.raises(ConfigError, match=r"scaling.num_workers 1,2: a sweep .* give one"):
        load(SweepConfig, flags)


def test_steps_count_every_epochs_last_smaller_batch() -> None:
    assert settings().batching.steps(17) == 3
    assert settings("--num_epochs", "2").batching.steps(17) == 6
    assert settings("--train.max_steps", "5").batching.steps(17) == 5
    assert settings("--train_batch_size", "4", "--scaling.num_workers", "2").batching.steps(1) == 1


def test_folders_are_absolute_and_uris_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings().run_dir == str(tmp_path / "out" / "o")
    assert settings("--scaling.storage_path", "s3://b/runs/").run_dir == "s3://b/runs/o"
    assert settings("--cache_dir", "~/c").cache == Path.home() / "c"


def test_an_evaluation_needs_a_model_or_a_file() -> None:
    assert (
        load(EvaluateConfig, ["--output_name", "o", "--predictions_file", "p.jsonl"]).task_type
        == "sql"
    )
    with pytest.raises(ConfigError, match="give --predictions_file, or --model_name"):
        load(EvaluateConfig, ["--output_name", "o"])


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=True
    )


HEAVY = ("torch", "ray", "mlflow", "transformers", "datasets", "peft", "sqlalchemy")


def test_settings_load_no_heavy_library() -> None:
    code = (
        f"import ray_sql.config, ray_sql.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


def test_help_documents_every_section_and_loads_no_heavy_library() -> None:
    helped = run_python("-X", "importtime", "-m", "jobs.finetune", "--help")
    imported = {line.split("|")[-1].strip() for line in helped.stderr.splitlines()}
    assert "ray_sql.config" in imported and not imported & set(HEAVY)
    text = helped.stdout
    for words in (
        "--learning_rate",
        "Raise the learning rate to this peak.",
        "--lora.r",
        "--tracking.uri",
        "--prompt.serializer",
    ):
        assert words in text
    assert os.fspath(Path.home()) not in text


def test_only_what_is_saved_can_be_measured() -> None:
    message = refusal("--save_steps", "100", "--evaluate.eval_steps", "250")
    assert "eval_steps 250 is no multiple of save_steps 100" in message and message.endswith(
        "use 200, or save_steps 50"
    )
    config = settings(
        "--save_steps", "10", "--evaluate.eval_steps", "20", "--train.max_steps", "45"
    )
    assert [step for step in (10, 20, 30, 40, 45) if config.is_eval_step(step, 100)] == [20, 40, 45]
    assert settings("--save_steps", "10").is_eval_step(10, 10_000)


def test_a_password_is_written_down_in_no_form(make_config: Any) -> None:
    for password in ("secret", "se/cr:et", "se@cr@et", "se@/cret", "se@cr/e@t", "se/c?r@et"):
        url = f"postgresql://reader:{password}@host/shop"
        public = make_config(
            **{"data.databases": url, "tracking.uri": f"mysql://u:{password}@host/m"}
        ).public()
        assert public["data"]["databases"] == "postgresql://reader@host/shop", (
            "given back, libpq looks for the password"
        )
        assert public["tracking"]["uri"] == "mysql://u:***@host/m"


def test_keys_in_a_storage_address_are_refused_and_not_repeated(make_config: Any) -> None:
    for name in ("scaling.storage_path", "output_dir", "prev_checkpoint"):
        with pytest.raises(ConfigError, match="keys do not belong into an address") as refused:
            make_config(**{name: "s3://AKIA:12/cr@et@bucket/runs"})
        assert f"{name} s3://AKIA:***@bucket/runs" in str(refused.value)
    assert mask_password("mysql://u:123/abc@h/db") == "mysql://u:***@h/db"
    assert (
        mask_password("no http://[::1]:5000/a@b, http://h:5000/a@b")
        == "no http://[::1]:5000/a@b, http://h:5000/a@b"
    )
    for place in (
        "s3://bucket/runs",
        "gs://anonymous@bucket/runs",
        "hdfs://me@name:8020/user/me@corp",
    ):
        assert make_config(**{"scaling.storage_path": place}).run_dir == f"{place}/run"


def test_settings_that_were_removed_are_dropped_from_files_and_named_to_users(
    tmp_path: Path,
) -> None:
    saved = yaml_file(tmp_path, "evaluate: {backend: transformers, limit: 3}\ncompare: []\n")
    assert settings("--config", saved).evaluate.limit == 3
    assert Config(**settings().public() | {"evaluate": {"backend": "transformers"}})
    assert refusal("--config", yaml_file(tmp_path, "compare: [a]\n")).endswith(
        "given; compare two files with `ray-sql compare A B`"
    )


def test_an_endpoint_is_asked_for_one_greedy_answer(tmp_path: Path) -> None:
    endpoint = "evaluate.backend: openai\n"
    assert "needs evaluate.url" in refusal("--config", yaml_file(tmp_path, endpoint))
    said = refusal("--config", yaml_file(tmp_path, endpoint + "evaluate.url: me:sesame@gpu:8000\n"))
    assert "neither http:// nor https://" in said and "sesame" not in said
    endpoint += "evaluate.url: http://127.0.0.1:8000/v1\n"
    assert settings("--config", yaml_file(tmp_path, endpoint)).evaluate.url
    for more in ("evaluate.samples: 2\n", "evaluate.num_beams: 2\n"):
        assert "one greedy answer" in refusal("--config", yaml_file(tmp_path, endpoint + more))
