"""Mappings of the collected data, on small files in the upstreams' own layouts."""

import csv
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from dataset_builders.mini.render import encode_mp4
from dataset_builders.synflow.collected import Collector, SkippedRow, collect, load_mappings, main, value_at
from dataset_builders.synflow.recipe import RecipeError


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_mapping_is_sound():
    mappings = load_mappings()
    assert len(mappings) >= 25 and {mapping.part for mapping in mappings.values()} == {"text", "image", "video"}
    for mapping in mappings.values():
        sides = mapping.direction.split("-")
        given = {"T": mapping.query.text, "I": mapping.query.image, "V": mapping.query.video}
        assert {letter for letter, place in given.items() if place} == set(sides[0])
        target = mapping.target or mapping.pool.item
        given = {"T": target.text, "I": target.image, "V": target.video}
        assert set(sides[1]) <= {letter for letter, place in given.items() if place}


def test_m_beir_joins_queries_and_candidates(tmp_path):
    """Query lines with pos_cand_list and neg_cand_list, candidates in a pool of their own, pictures by path."""
    for name, shade in (("q", 10), ("right", 90), ("wrong", 200)):
        path = tmp_path / "mbeir_images" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(shade))
    query = {
        "qid": "7:1",
        "query_txt": "is longer and blue",
        "query_img_path": "mbeir_images/q.jpg",
        "query_modality": "image,text",
        "query_src_content": None,
        "pos_cand_list": ["7:10"],
        "neg_cand_list": ["7:99", "7:11"],
    }
    lost = {**query, "qid": "7:2", "pos_cand_list": ["7:98"]}
    gone = {**query, "qid": "7:3", "query_img_path": "mbeir_images/none.jpg"}
    outside = {**query, "qid": "7:4", "query_img_path": "../../secret.jpg"}
    lines(tmp_path / "query" / "train" / "mbeir_fashioniq_train.jsonl", [query, lost, gone, outside])
    candidate = {"txt": None, "modality": "image", "src_content": None}
    pool = [
        {"did": f"7:{n}", "img_path": f"mbeir_images/{i}.jpg", **candidate} for n, i in ((10, "right"), (11, "wrong"))
    ]
    lines(tmp_path / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl", pool)
    collector = Collector(load_mappings()["FashionIQ", "TI-I"], tmp_path, repo=str(tmp_path))
    (pair,) = collector
    assert pair["query_text"] == "is longer and blue" and pair["query_image"]["bytes"] == picture(10)
    assert pair["target_image"]["bytes"] == picture(90) and pair["target_text"] is None
    assert [negative["image"]["bytes"] for negative in pair["negatives"]] == [picture(200)]
    assert pair["task"] == "ti2i" and pair["source_id"] == "FashionIQ/7:1"
    assert collector.skipped == {"target_missing": 1, "file_missing": 1, "path_outside_the_folder": 1}


def test_ms_marco_takes_the_selected_passage(tmp_path):
    passages = {"passage_text": ["no", "yes", "neither"], "is_selected": [0, 1, 0], "url": ["a", "b", "c"]}
    none = {**passages, "is_selected": [0, 0, 0]}
    rows = [
        {"query_id": 3, "query": "who?", "passages": passages, "answers": ["x"], "query_type": "PERSON"},
        {"query_id": 4, "query": "what?", "passages": none, "answers": ["x"], "query_type": "PERSON"},
    ]
    lines(tmp_path / "train.jsonl", rows)
    mapping = load_mappings()["MSMARCO", "T-T"].model_copy(update={"data_files": "train.jsonl", "config": None})
    collector = Collector(mapping, repo=str(tmp_path), negatives=2)
    (pair,) = collector
    assert (pair["query_text"], pair["target_text"]) == ("who?", "yes")
    assert [negative["text"] for negative in pair["negatives"]] == ["no", "neither"]
    assert collector.skipped == {"text_missing": 1}


def test_hotpot_qa_takes_the_supporting_paragraphs(tmp_path):
    context = {"title": ["A", "B"], "sentences": [["a one.", " a two."], ["b one."]]}
    row = {"id": "5a", "question": "why?", "context": context, "supporting_facts": {"title": ["B"], "sent_id": [0]}}
    lines(tmp_path / "train.jsonl", [row])
    mapping = load_mappings()["HotpotQA", "T-T"].model_copy(update={"data_files": "train.jsonl"})
    (pair,) = Collector(mapping, repo=str(tmp_path))
    assert pair["target_text"] == "b one." and pair["negatives"][0]["text"] == "a one. a two."


def test_webvid_reads_its_csv_and_files(tmp_path):
    movie = encode_mp4(np.zeros((4, 32, 32, 3), np.uint8))
    (tmp_path / "000001_000050").mkdir()
    (tmp_path / "000001_000050" / "21.mp4").write_bytes(movie)
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        writer.writerow([21, "https://x/21.mp4", "PT00H00M04S", "000001_000050", "A dark screen"])
        writer.writerow([22, "https://x/22.mp4", "PT00H00M04S", "000001_000050", "Not downloaded"])
    mapping = load_mappings()["WebVid", "T-V"].model_copy(update={"data_files": "train.csv"})
    collector = Collector(mapping, tmp_path, repo=str(tmp_path))
    output = tmp_path / "out"
    assert collect(collector, output) == 1
    row = next(iter(datasets.load_dataset(str(output), "t2v", split="train", streaming=True).decode(False)))
    assert row["target_video"]["bytes"] == movie and row["query_text"] == "A dark screen"
    assert "file_missing: 1" in (output / "README.md").read_text()


def test_web_dataset_tars_bring_media_and_texts(tmp_path):
    """PE-Video: mp4 and json of one name in a tar."""
    movie = encode_mp4(np.zeros((4, 32, 32, 3), np.uint8))
    with tarfile.open(tmp_path / "0000.tar", "w") as tar:
        for name, data in (("7.json", json.dumps({"human_caption": "A dark screen"}).encode()), ("7.mp4", movie)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    mapping = load_mappings()["PE-Video", "T-V"].model_copy(update={"data_files": "0000.tar"})
    (pair,) = Collector(mapping, repo=str(tmp_path))
    assert pair["target_video"]["bytes"] == movie and pair["query_text"] == "A dark screen"


def test_vista_brings_media_in_lists(tmp_path):
    """Edited pictures: query [picture, text], positive and hard_negative pictures; T2IT: pairs of picture and text."""
    for name, shade in (("q", 10), ("right", 90), ("wrong", 200), ("worse", 220)):
        (tmp_path / f"{name}.jpg").write_bytes(picture(shade))
    edit = {"q_type": "mm_it", "c_type": "image", "query": ["q.jpg", "make it lighter"], "positive": "right.jpg"}
    lines(tmp_path / "Image_Edit_307K_filter.jsonl", [{**edit, "hard_negative": ["wrong.jpg", "worse.jpg"]}])
    found = {"q_type": "text", "c_type": "mm_it", "query": "something grey", "positive": ["right.jpg", "grey"]}
    lines(tmp_path / "T2IT.jsonl", [{**found, "hard_negative": [["wrong.jpg", "light"], ["worse.jpg", "white"]]}])
    (pair,) = Collector(load_mappings()["VISTA", "TI-I"], tmp_path, repo=str(tmp_path), negatives=2)
    assert pair["query_text"] == "make it lighter" and pair["query_image"]["bytes"] == picture(10)
    assert [negative["image"]["bytes"] for negative in pair["negatives"]] == [picture(200), picture(220)]
    (pair,) = Collector(load_mappings()["VISTA", "T-TI"], tmp_path, repo=str(tmp_path), negatives=2)
    assert pair["target_text"] == "grey" and pair["target_image"]["bytes"] == picture(90)
    negatives = [(negative["text"], negative["image"]["bytes"]) for negative in pair["negatives"]]
    assert negatives == [("light", picture(200)), ("white", picture(220))]


@pytest.mark.parametrize(
    "name, direction, file, row",
    [
        (
            "InternVid-FLT",
            "T-V",
            "ab_00:00:03.5_00:00:05.0.mp4",
            {
                "YoutubeID": "ab",
                "Start_timestamp": "00:00:03.5",
                "End_timestamp": "00:00:05.0",
                "Caption": "a text",
                "UMT_Score": 0.4,
            },
        ),
        ("VAST", "T-V", "ab.7.mp4", {"clip_id": "ab.7", "vast_cap": "a text", "vision_cap": ["x"], "subtitle": "y"}),
        (
            "EVQA",
            "TI-T",
            "inat/1.jpg",
            {"question_id": "E_1", "question": "a text", "img_path": "inat/1.jpg", "pos_item_contents": ["page", "x"]},
        ),
    ],
)
def test_annotations_name_their_files(tmp_path, name, direction, file, row):
    """Rows of upstreams that publish texts alone, the media having been fetched into a folder."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"the medium")
    lines(tmp_path / "rows.jsonl", [row, {**row, "Caption": "", "vast_cap": "", "question": ""}])
    mapping = load_mappings()[name, direction].model_copy(update={"data_files": "rows.jsonl", "split": "train"})
    collector = Collector(mapping, tmp_path, repo=str(tmp_path))
    (pair,) = collector
    assert pair["query_text"] == "a text" and collector.skipped == {"text_missing": 1}
    assert (pair["target_video"] or pair["query_image"])["bytes"] == b"the medium"
    assert pair["target_text"] == ("page" if name == "EVQA" else None)


def test_remuq_takes_the_first_passage(tmp_path):
    (tmp_path / "30362819.jpg").write_bytes(picture(10))
    passages = [{"id": "d1", "text": "a tower"}, {"id": "d2", "text": "a bridge"}]
    row = {"question_id": "d5c", "img_id": 30362819, "question": "what is it?", "ctxs": passages, "answers": {"x": 1}}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (pair,) = Collector(load_mappings()["REMUQ", "TI-T"], tmp_path, repo=str(tmp_path))
    assert pair["query_image"]["bytes"] == picture(10) and pair["target_text"] == "a tower"
    assert pair["source_id"] == "REMUQ/d5c" and pair["task"] == "ti2t"


def test_the_whole_mixture_is_mapped():
    """Every dataset of the paper's parts text, image and video, in some direction."""
    names = (
        "MSMARCO HotpotQA WebQA CIRR Fashion200K Nights OVEN VisualNews EDIS FashionIQ MSCOCO REMUQ LLAVA EVQA CC3M"
    )
    rest = ["Laion", "ImageNet", "VL3-Syn7M (short)", "VL3-Syn7M (detailed)", "VISTA", "VAST", "InternVid-FLT"]
    assert {name for name, _ in load_mappings()} == {*names.split(), *rest, "CC3M", "PE-Video", "WebVid"}


def test_labels_become_texts(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "shark"])})
    rows = datasets.Dataset.from_list([{"image": {"bytes": picture(9), "path": None}, "label": 1}], features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    mapping = load_mappings()["ImageNet", "I-T"].model_copy(update={"data_files": "train.parquet"})
    (pair,) = Collector(mapping, repo=str(tmp_path))
    assert pair["target_text"] == "a picture of shark" and pair["query_image"]["bytes"] == picture(9)


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    lines(tmp_path / "train.jsonl", [{"name": "x", "page_dir": "a", "videoid": 1}])
    mapping = load_mappings()["WebVid", "T-V"].model_copy(update={"data_files": "train.jsonl"})
    with pytest.raises(RecipeError, match="name the folder that has them"):
        list(Collector(mapping, repo=str(tmp_path)))
    with pytest.raises(RecipeError, match="no row makes a pair.*file_missing"):
        collect(Collector(mapping, tmp_path, repo=str(tmp_path)), tmp_path / "out")
    assert main(["Nothing", "T-V", "--output", str(tmp_path / "out")]) == 1
    assert "no mapping of Nothing" in capsys.readouterr().err


def test_dotted_paths():
    row = {"a": [{"b": 1}, {"b": 2}], "c": {"d": None}}
    assert value_at(row, "a.b") == [1, 2] and value_at(row, "a.1.b") == 2
    assert value_at({"a": ["x", "y"]}, "a.did") == ["x", "y"]
    assert value_at({"a": [["x", "y"], ["z", None]]}, "a.*.1") == ["y", None]
    assert value_at(row, "a.7.b") is None and value_at(row, "c.d.e") is None
    assert issubclass(SkippedRow, ValueError)
