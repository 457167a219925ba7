"""Facts of UVRB: keys, order, abilities and metrics agree with each other and with the metric modules."""

import doctest

import pytest

from dataset_builders.uvrb import tasks
from dataset_builders.uvrb.tasks import TASKS, Task, abilities, get_tasks
from evaluate_metrics.uvrb_abilities.averages import ABILITIES, ABILITY_DATASETS, ABILITY_PARTS, DATASETS


def test_doctests():
    assert doctest.testmod(tasks).failed == 0


def test_sixteen_tasks_under_the_keys_of_the_metric_in_its_order():
    assert tuple(TASKS) == DATASETS
    assert all(key == task.key for key, task in TASKS.items())


def test_metrics_are_the_protocol_s():
    other = {key: task.metric for key, task in TASKS.items() if task.metric != "recall@1"}
    assert other == {"cmrb": "recall@10", "lovr_th": "recall@10", "ms_ti": "precision@1", "ms_tv": "precision@1"}
    assert TASKS["cmrb"].k == 10 and TASKS["ms_ti"].k == 1


def test_abilities_agree_with_the_averaging_rule():
    narrowest = {ability: tuple(k for k, t in TASKS.items() if abilities(t)[-1] == ability) for ability in ABILITIES}
    assert {ability: keys for ability, keys in narrowest.items() if keys} == ABILITY_DATASETS
    parents = {
        path[place]: path[place - 1] for path in map(abilities, TASKS.values()) for place in range(1, len(path))
    }
    assert parents == {part: ability for ability, parts in ABILITY_PARTS.items() for part in parts}


def test_instructions_differ_and_are_sentences():
    instructions = [task.instruction for task in TASKS.values()]
    assert len(set(instructions)) == 16
    assert all(text.startswith("Find ") and text.endswith(".") for text in instructions)


def test_published_counts():
    assert sum(task.n_query for task in TASKS.values()) == 39658
    assert (TASKS["pev_k"].n_query, TASKS["pev_k"].n_corpus) == (14427, 15000)
    assert TASKS["msrvtt_i2v"].query_words is None


def test_configs():
    assert TASKS["msrvtt"].configs == ("msrvtt-corpus", "msrvtt-queries", "msrvtt-qrels")
    assert [key for key, task in TASKS.items() if "ms_" in key and f"{key}-top_ranked" in task.configs] == [
        "ms_ti",
        "ms_tv",
    ]


def test_get_tasks_keeps_the_paper_s_order_and_names_an_unknown_key():
    assert [task.key for task in get_tasks(["ms_ti", "msrvtt", "ms_ti"])] == ["msrvtt", "ms_ti"]
    with pytest.raises(ValueError, match="Unknown dataset key.*msrvttt.*choose from msrvtt, didemo"):
        get_tasks(["msrvttt"])


@pytest.mark.parametrize("change", [{"metric": "recall"}, {"metric": "ndcg@10"}, {"query_modality": "audio"}])
def test_a_task_that_cannot_be_run_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        Task(**{**vars(TASKS["msrvtt"]), **change})
