import pytest

from yolo_fewshot.evaluate import published as module
from yolo_fewshot.evaluate.published import COLUMNS, Result, plot_published, read_published
from yolo_fewshot.evaluate.report import FIGURES, NUMBERS, add_row, report

ROWS = "CD-ViTO,10,12.8,300,ECCV 2024\nDINO-DETR,10,11.8,47,VFM-MoE\nDINO-DETR,5,9.6,47,VFM-MoE\n"


def write(folder, text=ROWS, columns="method,shots,ap,params_m,source"):
    (folder / "published.csv").write_text(f"{columns}\n{text}")
    return folder / "published.csv"


def test_published_results_are_read(tmp_path):
    rows = read_published(write(tmp_path))
    assert rows[0] == Result("CD-ViTO", 10, 12.8, 300.0, "ECCV 2024") and len(rows) == 3


@pytest.mark.parametrize(
    "text, columns, message",
    [
        (ROWS, "method,shots,AP,params_m,source", r"lacks the column ap\. It needs method,shots,ap"),
        ("a,ten,1,1,x\n", ",".join(COLUMNS), r"^Row 1 of published=.* has an invalid number: .*'ten'"),
        ("a,1,1,1,x\na,1\n", ",".join(COLUMNS), r"^Row 2 of published=.* has an invalid number"),
        ("a,1,101,1,x\n", ",".join(COLUMNS), r"^Row 1 .* must have ap in %"),
        ("a,1,1,0,x\n", ",".join(COLUMNS), r"^Row 1 .* params_m above 0"),
        ("a,1,nan,1,x\n", ",".join(COLUMNS), r"^Row 1 .* must have ap in %"),
    ],
)
def test_invalid_files(tmp_path, text, columns, message):
    with pytest.raises(ValueError, match=message):
        read_published(write(tmp_path, text, columns))


def test_own_and_published_results_are_in_the_report(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "yolo_fewshot.evaluate.report.plot_published", lambda *args: seen.append(args) or plot_published(*args)
    )
    for k, s, ap in ((10, 0, 0.2), (10, 1, 0.3), (1, 0, 0.05), (1, 1, 0.05)):
        figures = dict.fromkeys((*FIGURES["FSOD"], *NUMBERS), 0.1) | {"FSOD_cAP": ap, "params": 2.6}
        add_row(tmp_path / "rows.csv", {**figures, "method": "auto", "shots": k, "seed": s})
    record = {"shots": [1, 10], "seeds": 2, "methods": ["auto"], "leakage": [], "command": "c"}
    report(tmp_path, {**record, "versions": {}, "machine": {}}, 3, read_published(write(tmp_path)))
    ((ours, others, file),) = seen
    assert [(x.method, x.shots, x.params_m) for x in ours] == [("auto", 1, 2.6), ("auto", 10, 2.6)] and len(others) == 3
    assert ours[1].ap == pytest.approx(25) and ours[1].half == pytest.approx(12.706 * 5)  # s / sqrt(2) is 5 points
    text = (tmp_path / "results.md").read_text()
    assert "| 10 | CD-ViTO | 12.8 | 300 | ECCV 2024 |" in text and text.index("| 5 | DINO") < text.index("| 10 | CD")
    assert file.stat().st_size > 5000


def test_no_plot_without_a_common_number_of_shots(tmp_path):
    plot_published([Result("auto", 1, 5, 2.6, "")], read_published(write(tmp_path)), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    assert module.format_published([])[0].startswith("| shots | method | COCO AP, %")
