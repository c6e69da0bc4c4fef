"""Structures and structure sets: identity by name, colors, sides, and reading them from tables and JSON."""

import colorsys
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.structure import Structure, StructureSet, distinct_color, read_structures

LIVER = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
)
RIGHT_LUNG = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
    "~SCT^39607008^Lung~SCT^24028007^Right~Anatomic codes - DICOM master list~^^~^^"
)
NAMES = st.lists(
    st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="|"), min_size=1, max_size=8),
    min_size=1,
    max_size=12,
    unique_by=str.casefold,
)
COLORS = st.tuples(*[st.floats(0, 1)] * 3)


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "structures.csv"
    path.write_bytes(text.encode(encoding))
    return path


@given(NAMES)
def test_channel_k_is_the_kth_structure_and_names_find_it(names):
    structures = StructureSet.from_names(names)
    assert structures.names == tuple(names)
    assert [structures.channel(name) for name in names] == list(range(1, len(names) + 1))
    assert [structures.named(name) for name in names] == list(structures)
    assert all(name in structures for name in names)


def test_an_unknown_name_is_refused_with_the_names_there_are():
    structures = StructureSet.from_names(["liver", "spleen"])
    assert "Liver" not in structures
    with pytest.raises(InputError, match='no structure "Liver"; the structures are: liver, spleen'):
        structures.channel("Liver")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "at least one structure"),
        ([""], "no name"),
        (["liver "], "blanks around"),
        (["liver", "spleen", "liver"], '"liver" is named twice'),
        (["Liver", "lIVER"], '"lIVER" is named twice'),
        (["STRASSE", "straße"], "named twice"),
        (["a|b"], "reserve"),
        (["a\nb"], "reserve"),
        (["a\tb"], "reserve"),
    ],
)
def test_a_set_without_clear_names_is_refused(names, complaint):
    with pytest.raises(InputError, match=complaint):
        StructureSet.from_names(names)


@pytest.mark.parametrize("terminology", ["liver", "SCT^10200004^Liver", LIVER + "~", LIVER + "|", "a~b~c~d~e~f\n~g"])
def test_a_terminology_that_slicer_could_not_read_is_refused(terminology):
    with pytest.raises(InputError, match='terminology of "liver"'):
        StructureSet([Structure("liver", (1, 0, 0), terminology)])


@given(NAMES, st.data())
def test_json_gives_back_the_same_set(tmp_path_factory, names, data):
    structures = StructureSet(
        Structure(name, data.draw(COLORS), data.draw(st.sampled_from(["", LIVER, RIGHT_LUNG]))) for name in names
    )
    stored = json.loads(json.dumps(structures.to_json()))
    assert StructureSet.from_json(stored, "x.json") == structures


@pytest.mark.parametrize(
    "damage",
    [
        None,
        5,
        {"name": "liver"},
        ["liver"],
        [None],
        [{"name": "liver"}],
        [{"color": [0, 0, 0]}],
        [{"name": 5, "color": [0, 0, 0]}],
        [{"name": None, "color": [0, 0, 0]}],
        [{"name": "liver", "color": "red"}],
        [{"name": "liver", "color": None}],
        [{"name": "liver", "color": [1, 0]}],
        [{"name": "liver", "color": [1, 0, 0, 0]}],
        [{"name": "liver", "color": [1, 0, 0], "terminology": None}],
    ],
)
def test_damaged_json_is_refused(damage):
    with pytest.raises(InputError, match=r"structures in some\.json are damaged"):
        StructureSet.from_json(damage, "some.json")


def test_colors_of_a_hundred_structures_differ_and_neighbors_differ_clearly():
    colors = [distinct_color(n) for n in range(120)]
    assert len(set(colors)) == 120
    assert all(0 <= part <= 1 for color in colors for part in color)
    hues = [colorsys.rgb_to_hsv(*color)[0] for color in colors]
    steps = [min(abs(a - b), 1 - abs(a - b)) for a, b in zip(hues, hues[1:], strict=False)]
    assert min(steps) > 0.3


@pytest.mark.parametrize(
    "name",
    [
        "left kidney",
        "Kidney, Right",
        "hippocampus_l",
        "R femur",
        "femur (R)",
        "lung-rt",
        "LEFT KIDNEY",
        "LeftKidney",
        "kidneyL",
        "ctx-lh-precuneus",
        "Niere links",
        "rechte Lunge",
        "rein gauche",
        "riñón izquierdo",
        "polmone destro",
    ],
)
def test_a_side_in_the_name_is_seen(name):
    assert Structure(name, (0, 0, 0)).has_side


@pytest.mark.parametrize("name", ["liver", "rectum", "bright muscle", "cleft", "lumbar spine", "prostate", "ventral"])
def test_a_name_without_a_side_has_none(name):
    assert not Structure(name, (0, 0, 0)).has_side


def test_a_side_in_the_terminology_is_seen():
    assert Structure("lung", (0, 0, 0), RIGHT_LUNG).has_side
    assert not Structure("liver", (0, 0, 0), LIVER).has_side
    assert StructureSet([Structure("liver", (0, 0, 0)), Structure("lung", (0, 0, 0), RIGHT_LUNG)]).has_sides
    assert not StructureSet([Structure("liver", (0, 0, 0), LIVER)]).has_sides


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_gives_names_colors_and_terminologies(tmp_path, encoding, end):
    lines = ["name,color,terminology", "Größe,#ff0080,", f'" liver ",,"{LIVER}"', "spleen,#000000"]
    structures = read_structures(table(tmp_path, end.join(lines), encoding))
    assert structures.names == ("Größe", "liver", "spleen")
    assert structures[0].color == pytest.approx((1, 0, 128 / 255), abs=1e-6)
    assert structures[1] == Structure("liver", distinct_color(1), LIVER)
    assert structures[2] == Structure("spleen", (0, 0, 0))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lists no structures"),
        ("name\n", "lists no structures"),
        ("liver\nspleen\n", 'one of them "name"'),
        ("name;color\nliver;#ff0000\n", 'one of them "name"'),
        ("name,color\nliver,red\n", '"red" in .* is not a color'),
        ("name,color\nliver,#ff00\n", '"#ff00" in .* is not a color'),
        ("name\nliver\nLiver\n", "named twice"),
        ("name\n\n,\n", "no name"),
        ("name\n" + "x" * 200_000, "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, complaint):
    with pytest.raises(InputError, match=complaint):
        read_structures(table(tmp_path, text))


def test_a_table_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_structures(table(tmp_path, "name\nGröße\n", "latin-1"))


def test_a_list_or_a_project_in_json_gives_its_structures(tmp_path):
    structures = StructureSet([Structure("liver", (0.5, 0.25, 1.0), LIVER), Structure("spleen", (0, 0, 0))])
    path = tmp_path / "some.json"
    path.write_text(json.dumps(structures.to_json()), encoding="utf-8")
    assert read_structures(path) == structures
    path.write_text(json.dumps({"format": 1, "structures": structures.to_json()}), encoding="utf-8")
    assert read_structures(path) == structures


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "5", '"liver"', '{"structures": 5}', "[[]]", "[]"])
def test_json_without_structures_is_refused(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        read_structures(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_structures(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_structures(tmp_path)
