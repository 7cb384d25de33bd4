"""Tables and figures from measured rows; README says what bench/results/ says."""

import pytest

import show
from measure import roofs
from measure.rows import Row, append, read
from pages import markdown, tables

FACTS = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "revision": "a" * 40 + "+changes"}
FACTS["date"] = "2026-01-02T03:04:05+00:00"


def op(quantity: str, dtype: str, ours: float, theirs: float, **more) -> Row:
    given = {
        "shape": {"B": 8, "T": 128, "I": 768, "O": 3072, "Q": 0, "K": 0, "bias": False},
        "seconds": {"ours": ours, "kronfluence order": theirs, "GEMM": 0.1},
        "flops": 10**9,
        "bytes": 10**7,
        "roofs": {"flops_per_second": 1e12, "bytes_per_second": 1e11},
        "environment": FACTS,
        **more,
    }
    return Row("ops", f"{quantity} 768 x 3072", quantity, dtype=dtype, **given)


def stage(case: str, name: str, ratio: float, **more) -> Row:
    given = {"error": 1e-6, "details": {"spearman": 0.9999}, "environment": FACTS, **more}
    seconds = {"kronfluence": ratio, "ours": 1.0}
    return Row("against_kronfluence", case, name, seconds=seconds, **given)


def test_pages_say_what_was_measured():
    show.main(["tables", "--check"])


def test_an_old_page_is_refused_and_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table:acceptance -->\n12x\n<!-- /table -->\nafter\n")
    monkeypatch.setattr(show, "PAGES", (page,))
    monkeypatch.setattr(show, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"README\.md; run python bench/show\.py tables"):
        show.main(["tables", "--check"])
    show.main(["tables"])
    show.main(["tables", "--check"])
    text = page.read_text()
    assert text.startswith("before\n<!-- table:acceptance -->")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "12x" not in text


def test_rows_where_we_lose_are_shown(tmp_path):
    rows = [
        op("covariance", "bfloat16", 2.0, 1.0),
        op("eigenvalues", "float32", 9.0, 9.0),
        op("eigenvalues", "float32", 1.0, 3.0),  # measured again
        op("self_influence", "bfloat16", 1.0, 4.0),
    ]
    append(tmp_path / "acceptance.jsonl", rows)
    shown = tables.render("acceptance", tmp_path).splitlines()
    assert len(shown) == 6
    row = "| corrected eigenvalues | 768 x 3072, T=128, B=8 | 3000 ms | 1000 ms | 3.0x |"
    assert shown[2] == row
    assert shown[3].startswith("| covariance, bfloat16: our weakest |")
    assert shown[3].endswith("| 0.50x |")
    assert shown[5] == "Some CPU, 2 threads, torch 2.13.0, revision aaaaaaaaa+, 2026-01-02."


def test_every_row_has_every_other_way(tmp_path):
    rows = [op("eigenvalues", "bfloat16", 0.002, 0.01, extra_bytes={"ours": 3 << 20})]
    rows[0].seconds["bare bmm"] = 0.001
    append(tmp_path / "acceptance-cuda.jsonl", rows)
    shown = tables.render("acceptance-cuda", tmp_path)
    assert "| kronfluence order | bare bmm |" in shown
    assert "| 2 ms | 50% | 3.0 | 5.00x | 0.50x |" in shown


def test_stages_of_kronfluence_have_a_column_a_case(tmp_path):
    rows = [stage("small", "covariance", 2.0), stage("small", "self scores", 0.5)]
    rows += [stage("large", "covariance", 3.0)]
    rows += [stage("large", "pairwise", 4.0, error=None, details={})]
    append(tmp_path / "against_kronfluence.jsonl", rows)
    shown = tables.render("against-kronfluence", tmp_path).splitlines()
    assert shown[0].startswith("| stage | small | large |")
    first = "| covariance | 2000 ms -> 1000 ms, **2.00x** | 3000 ms -> 1000 ms, **3.00x** |"
    assert shown[2] == f"{first} 1e-06 | 0.9999 |"
    assert "**0.50x** | | 1e-06" in shown[3]
    assert shown[4].startswith("| pairwise | | 4000 ms")


def test_what_nobody_measured_is_told(tmp_path):
    assert tables.render("stages", tmp_path) == "Not measured yet: `python bench/stages.py`."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-5, "20 us"), (0.00123, "1.23 ms"), (0.5, "500 ms"), (9.9996, "10.0 s"), (71.23, "71.2 s")],
)
def test_durations(seconds, text):
    assert markdown.duration(seconds) == text


def test_the_roofline(tmp_path, capsys):
    # 100 FLOPs a byte below 10 TFLOP/s of copying: the GEMM rate is the roof; then the copy's.
    slow = {"flops_per_second": 1e12, "bytes_per_second": 5e9}
    rows = [op("eigenvalues", "float32", 0.002, 1.0)]
    rows += [op("covariance", "float32", 0.002, 1.0, roofs=slow)]
    file, figure = tmp_path / "ops.jsonl", tmp_path / "roofline.svg"
    append(file, [*rows, stage("small", "covariance", 2.0)])
    show.main(["roofline", str(file), "--plot", str(figure)])
    shown = capsys.readouterr().out
    assert "| 100.0 | 2 ms | 500 | 1000 (GEMM) | 50% |" in shown
    assert "| 100.0 | 2 ms | 500 | 500 (copy) | 100% |" in shown
    assert "FLOPs a byte" in figure.read_text()


def test_the_roofline_refuses_files_without_rows(tmp_path):
    append(tmp_path / "none.jsonl", [stage("small", "covariance", 2.0)])
    with pytest.raises(SystemExit, match=r"no rows of ops\.py in .*none\.jsonl"):
        show.main(["roofline", str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: page"),
        (["roofline"], "the following arguments are required: files"),
    ],
)
def test_it_asks_what_to_show(words, message, capsys):
    with pytest.raises(SystemExit):
        show.main(words)
    assert message in capsys.readouterr().err


def test_roofs_are_measured(tmp_path, capsys):
    out = tmp_path / "roofs.jsonl"
    show.main(["roofs", "--device", "cpu", "--out", str(out)])
    rows = read(out)
    assert {row.dtype for row in rows} == set(roofs.DTYPES["cpu"])
    assert all(row.roofs.keys() == {"flops_per_second", "bytes_per_second"} for row in rows)
    assert "| copy |" in capsys.readouterr().out


def test_a_line_that_is_no_row_is_told(tmp_path):
    file = tmp_path / "ops.jsonl"
    append(file, [op("eigenvalues", "float32", 0.002, 1.0)])
    with file.open("a") as lines:
        lines.write('{"case": "small-gpt", "plain_s": 1.0}\n')
    with pytest.raises(ValueError, match=r"ops\.jsonl:2: not a measured row: .*'case'"):
        read(file)
