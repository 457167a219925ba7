"""Settings: precedence, and one clear message for each mistake."""

import pytest

from training.arguments import computed_settings, parse_arguments


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_defaults_yaml_command_line(config):
    words = config(
        "learning_rate: 0.002\nepochs: 5\ntask_batch_size: {t2v: 96}\ntasks: [t2t, t2v]\nmask_margin: null\n"
    )
    model, data, training = parse_arguments([*words, "--epochs", "2", "--task_hard_negatives", "t2v=2", "--overwrite"])
    assert (training.temperature, training.learning_rate, training.epochs) == (0.03, 0.002, 2)
    assert training.mask_margin is None
    assert training.overwrite
    assert (data.batch_size_of("t2t"), data.batch_size_of("t2v")) == (64, 96)
    assert (data.hard_negatives_of("t2t"), data.hard_negatives_of("t2v")) == (1, 2)
    assert training.run_dir.endswith("gve-mini/run")
    assert model.prober is None


def test_the_shorter_of_two_limits_counts():
    _, data, _ = parse_arguments(
        ["--max_pairs", "50", "--task_pairs", "t2v=9", "t2i=99", "--task_upsampling", "t2v=1.5"]
    )
    assert [data.max_pairs_of(task) for task in ("t2v", "t2i", "t2t")] == [9, 50, 50]
    assert data.task_upsampling == {"t2v": 1.5}


def test_checkpoint_settings_leave_out_where_things_are_written(config):
    first = parse_arguments(["--output_dir", "a", "--save_steps", "5"])
    second = parse_arguments(["--output_dir", "b", "--save_steps", "9"])
    assert computed_settings(*first) == computed_settings(*second)
    assert computed_settings(*first) != computed_settings(*parse_arguments(["--seed", "1"]))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("lerning_rate: 0.1", "unknown setting lerning_rate in the config file; did you mean learning_rate"),
        ("zzz: 1", "unknown setting zzz in the config file; --help lists"),
        ("temperature: 3.0", "temperature must be a number from 0.001 to 1.0 .*, got 3.0"),
        ("temperature: [0.1]", "temperature must be a number"),
        ("epochs: 2.5", "epochs must be a whole number of at least 1, got 2.5"),
        ("seed: -1", "seed must be a whole number of at least 0, got -1"),
        ("steps_per_epoch: 0", "steps_per_epoch must be a whole number of at least 1 or null, got 0"),
        ("batch_size: yes", "batch_size must be a whole number from 2 to 65536, got True"),
        ("overwrite: 1", "overwrite must be true or false, got 1"),
        ("schedule: [pyramid]", "schedule must be one of pyramid, reversed, uniform, proportional, temperature"),
        ("method: qlora", "method must be one of full, lora, got 'qlora'"),
        ("quantization: 4bit", "quantization packs weights that do not learn: it needs method lora"),
        ("quantization: 2bit", "quantization must be one of 4bit, 8bit, got '2bit'"),
        ("lora_targets: []", "lora_targets must be a list of different names"),
        ("task_upsampling: {t2v: -1}", "task_upsampling of t2v must be a number of at least 0, got -1"),
        ("task_upsampling: {t2v: .inf}", "task_upsampling of t2v must be a number of at least 0, got inf"),
        ("tasks: [t2v]\ntask_upsampling: {t2v: 0}", "task_upsampling is 0 for every task"),
        ("matryoshka_dims: [0]", "matryoshka_dims must be whole numbers of at least 1, got 0"),
        ("report_to: [paper]", "report_to must be among trackio, tensorboard, wandb, got 'paper'"),
        ("mine_every_epoch: true", "mine_every_epoch needs negative_corpus"),
        ("tasks: t2v", "tasks must be a list of different config names"),
        ("tasks: [t2v, t2v]", "tasks must be a list of different config names"),
        ("task_batch_size: {x2v: 8}", "task_batch_size names the task 'x2v', which is not among tasks"),
        ("task_batch_size: {t2v: 1}", "task_batch_size of t2v must be a whole number of at least 2, got 1"),
        ("task_batch_size: 7", "task_batch_size must be a mapping"),
        ("push_to_hub: true", "push_to_hub needs hub_model_id"),
        ("hub_model_id: gve-mini", "hub_model_id must be owner/name, such as org/gve-mini, got 'gve-mini'"),
        ("adam_beta2: 1", "adam_beta2 must be a number from 0 to 0.999999, got 1"),
        ("output_dir: 5", "output_dir must be a text, got 5"),
        ("output_dir: a\nrun_dir: a", "run_dir a would be pushed with output_dir"),
        ("output_dir: a\nrun_dir: a/state", "run_dir a/state would be pushed with output_dir"),
        ("- a list", "must contain a YAML mapping"),
        ("a: [", "the config file is not YAML"),
    ],
)
def test_mistakes_in_the_config_file(config, yaml, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments(config(yaml))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learn_rate", "1"], "unknown setting learn_rate on the command line; did you mean learning_rate"),
        (["--temperature=9"], "temperature must be a number from 0.001 to 1.0"),
        (["--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
        (["--task_batch_size", "t2v"], "task_batch_size of t2v must be a whole number"),
        (["stray"], "'stray' on the command line belongs to no setting"),
        (["--config", "missing.yaml"], "cannot read the config file missing.yaml: No such file"),
        (["--config"], "--config needs a file"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)
