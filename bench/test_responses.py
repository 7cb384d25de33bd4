"""The error split from one command: the exact solve is nearest, the rest told beside it."""

import responses


def test_the_exact_solve_is_the_response(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(responses, "LISSA", 20)
    monkeypatch.setattr(responses, "DRAWS", 2)
    out = tmp_path / "page"
    responses.main(["--cases", "diabetes", "--queries", "2", "--examples", "4", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(": ")[0]: float(line.split(": ")[1].split()[0]) for line in lines[:-1]}
    exact = found.pop("diabetes, exact solve")
    assert exact > 0.99
    assert all(exact > other for other in found.values())
    text = out.with_suffix(".md").read_text()
    assert f"| exact solve | {exact:.3f} +- " in text
    assert "![correlations](page.svg)" in text
    assert "<svg" in out.with_suffix(".svg").read_text()
