import pytest
from lakebed.queries.registry import load_report, report_names
from lakebed.queries.sections import SectionError, parse_sections


def test_sections_in_order_with_their_parameters_and_reads():
    text = """-- About.
-- view: a
SELECT $run AS r FROM steps -- FROM nowhere $no

-- rows: b_rows
WITH c AS (FROM a) FROM c JOIN a USING (r)
"""
    first, second = parse_sections(text, "x.sql")
    assert (first.kind, first.name, first.parameters(), first.reads()) == ("view", "a", {"run"}, {"steps"})
    assert (second.kind, second.name, second.reads()) == ("rows", "b_rows", {"a", "c"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-- row: a\nSELECT 1", "unknown directive 'row'"),
        ("-- rows: a\nSELECT 1\n-- view: a\nSELECT 2", "'a' stands twice"),
        ("-- rows: a\n-- only a comment\n-- view: b\nSELECT 1", "'a' is empty"),
        ("-- rows: a\nSELECT 1;\nSELECT 2", "must be one SELECT"),
        ("-- rows: a\nDROP TABLE x", "must be one SELECT"),
        ("-- rows: A b\nSELECT 1", "is no section name"),
        ("SELECT 1\n-- rows: a\nSELECT 1", "SQL before the first"),
    ],
)
def test_anything_out_of_form_is_refused(text, message):
    with pytest.raises(SectionError, match=message):
        parse_sections(text, "x.sql")


@pytest.mark.parametrize("name", report_names())
def test_every_report_declares_what_its_sql_has(name):
    report = load_report(name)
    sections = parse_sections(report.sql_text(), name)
    names = {section.name for section in sections}
    written = {section.name for section in sections if section.kind == "rows"}
    assert written
    assert set(report.row_files) <= written
    assert {chart.view for chart in report.charts} | {table.view for table in report.tables} <= names
    assert len({chart.name for chart in report.charts}) == len(report.charts)
    last_clauses = [section.sql.rsplit("ORDER BY", 1) for section in sections if section.kind == "rows"]
    assert all(len(parts) == 2 for parts in last_clauses), "a row set must be ordered"
    assert all(field.description for field in report.model_fields.values())
    assert report.summary()
    assert f"lakebed query {name} " in report.example
