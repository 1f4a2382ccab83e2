from contextlib import suppress
from pathlib import Path
from time import process_time, sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from alignbench import UserError, load_scorer
from alignbench.embedded.drawing.lettering import Lettering, sample_lettering, sample_text
from alignbench.files.text import prompt_identity
from evals.detectors.grammar import COCO, SCENES
from evals.ocr import OCR, quoted_text, similarity, target_text, unquoted_words
from evals.readers.base import MAX_ASPECT_RATIO, contrast_image, locate, widened
from evals.readers.easyocr import EasyOCRReader
from evals.readers.forms import normalised
from evals.readers.rapidocr import RapidOCRReader


def sign(
    text: str, size: int = 30, canvas: tuple[int, int] = (160, 60), color: str = "black", ground: str = "white"
) -> np.ndarray:
    """Text drawn by Pillow in a face that the drawing package does not use."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/STIXGeneralBol.ttf"), size)
    image = Image.new("RGB", canvas, ground)
    ImageDraw.Draw(image).text((10, 10), text, font=font, fill=color)
    return np.asarray(image)


def word(text: str, color: str = "black", background: str = "sky") -> np.ndarray:
    return Lettering(text, color, background, "sans", 16, 24, (0, 16)).draw()


@pytest.fixture(scope="module")
def easyocr() -> OCR:
    scorer = load_scorer("ocr", characters="letters")
    assert isinstance(scorer, OCR)
    return scorer


@pytest.fixture(scope="module")
def easyocr_of_all() -> OCR:
    scorer = load_scorer("ocr")
    assert isinstance(scorer, OCR)
    return scorer


@pytest.fixture(scope="module")
def easyocr_in_bfloat16() -> OCR:
    scorer = load_scorer("ocr", characters="letters", precision="bf16")
    assert isinstance(scorer, OCR)
    return scorer


@pytest.fixture(scope="module")
def rapidocr() -> OCR:
    scorer = load_scorer("ocr", reader="rapidocr")
    assert isinstance(scorer, OCR)
    return scorer


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "STOP"', "STOP"),
        ('"HI" in red letters', "HI"),
        ("a sign that says \u201cOPEN\u201d", "OPEN"),
        ('a "NEW" shop beside an "OLD" one', "NEW OLD"),
        ('the word "\u00fcber"', "\u00fcber"),
        ('A 5" screen that says "HELLO"', "HELLO"),
        ('a 5" by 7 " photo and a 6\'2\'\' man "HI"', "HI"),
        ('"ROUTE 66" and a 5" nail', "ROUTE 66"),
        ('"Hello," she said, ("world")', "Hello, world"),
        ('says"HI"and "it\'s"', "HI it's"),
        ("\u201eHallo\u201c und \u201eWelt\u201d", "Hallo Welt"),
        ("\u201eHallo\u201c und \u201cHi\u201d", "Hallo Hi"),
        ('\u201dHej\u201d och "CAT"', "Hej CAT"),
        ('"HI\u201d and \u201cHO"', "HI HO"),
        ('caption: ""Big Sale""', "Big Sale"),
        ('says \\"HI\\"', "HI"),
        ('"" and "CAT"', "CAT"),
    ],
)
def test_only_what_stands_in_double_quotes_is_the_target(prompt: str, target: str) -> None:
    assert target_text(prompt) == target


@pytest.mark.parametrize(
    "prompt",
    [
        *("a red circle", 'an empty ""', "it's a 'dog'", 'one "quote', '"\u200b" x', '" \u2060\ufeff" x'),
        *('a "CAT" and a lone " mark', 'HELLO" he said', '"12" LP and 7" EP" "HI"', '"the \u201cHI\u201d sign"'),
        *('says " HELLO "', 'half an " and half an " "5"', '"HI " x', '""HI"', '"HI"" x', "\u201eHI", '"A\u201cB"'),
        *("\u300c\u6771\u4eac\u300d", "\u00abbonjour\u00bb", "\uff02FULL\uff02", "''OPEN''", "``OPEN''", '\u00aba\u00bb "b"'),
    ],
)
def test_a_prompt_that_quotes_nothing_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="double quotes"):
        target_text(prompt)


@given(
    st.text(st.sampled_from("ABC 5'6."), min_size=1, max_size=8).filter(str.strip),
    st.lists(st.sampled_from(['a 5" screen', "a sign", 'a 12" by 4" board,', 'half an "', "it's", "\u201d"]), max_size=3),
    st.sampled_from(['"{}"', "\u201c{}\u201d", "\u201e{}\u201c", '""{}""', '\\"{}\\"', "\u00ab{}\u00bb"]),
    st.lists(st.sampled_from(['a 5" nail', "and more.", '7" wide', '"', "\u201c"]), max_size=2),
)
def test_a_target_is_the_right_one_or_refused(text: str, before: list[str], quotes: str, after: list[str]) -> None:
    try:
        target = target_text(" ".join([*before, quotes.format(text), *after]))
    except UserError:
        return
    assert target == text.strip()


@pytest.mark.parametrize(
    "piece", ['"', "\u201c", '"a', 'a "', "'", '1" ', '\\"', "\u201e\u201c", '\u00ab "a" ', "a photo of a ", " "]
)
def test_no_prompt_takes_long(piece: str) -> None:
    prompt, start = piece * (100_000 // len(piece)), process_time()
    with suppress(UserError):
        target_text(prompt)
    assert SCENES.parse(prompt) is COCO.parse(prompt) is None
    assert len(quoted_text(prompt)) + len(unquoted_words(prompt)) + len(prompt_identity(prompt)) <= 3 * len(prompt)
    assert process_time() - start < 2  # a tenth of it; what grows with the square takes minutes


def test_a_long_prompt_is_refused_with_a_short_sentence() -> None:
    with pytest.raises(UserError) as error:
        target_text("no text " * 10_000)
    assert len(str(error.value)) < 500


def test_what_is_not_quoted() -> None:
    assert unquoted_words('a 5" RED sign "BLUE" on \u201eGREEN\u201c').split() == ["a", '5"', "RED", "sign", "on"]
    assert unquoted_words('one "quote') == 'one "quote'


@pytest.mark.parametrize(
    ("read", "target"),
    [
        ("\uff33\uff34\uff2f\uff30", "STOP"),
        ("CAFE\u0301", "caf\u00e9"),
        ("\ufb01sh", "FISH"),
        ("STRASSE", "Stra\u00dfe"),
        ("don't", "DON\u2019T"),
        ("A\u00a0B\u3000C", "a\u200bbc"),
    ],
)
def test_read_and_target_are_compared_in_one_normal_form(read: str, target: str) -> None:
    assert similarity(read, target) == similarity(target, read) == 1.0


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("STOP", "STOP", 1.0),
        ("stop", "STOP", 0.0),  # case counts
        ("THE STOP SIGN", "STOP", 4 / 13),  # 9 insertions, 13 letters; a part is not enough
        ("ABCDEFGHIJ", "XY", 0.0),
        ("S T O P", "STOP", 4 / 7),  # spaces count
        (" STOP ", "STOP", 1.0),  # but not at the ends
        ("", "STOP", 0.0),
        ("kitten", "sitting", 4 / 7),
        ("New York", "New Yorc", 7 / 8),
        ("CAFE\u0301", "CAF\u00c9", 1.0),
    ],
)
def test_tmpo_similarity_by_hand(read: str, target: str, expected: float) -> None:
    assert similarity(read, target, "tmpo") == pytest.approx(expected, abs=1e-12)


def test_spaces_and_case_do_not_count() -> None:
    assert normalised(" Co\tFf\nee ") == "coffee"


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("STOP", "stop", 1.0),
        ("STEP", "STOP", 0.75),  # one of four letters
        ("", "STOP", 0.0),
        ("THE STOP SIGN", "STOP", 1.0),  # contained
        ("ABCDEFGHIJ", "XY", 0.0),  # distance 10 counts as at most 2
        ("ST", "STOP", 0.5),
        ("S T O P", "STOP", 1.0),
        ("kitten", "sitting", 4 / 7),  # the textbook pair: distance 3
    ],
)
def test_similarity_by_hand(read: str, target: str, expected: float) -> None:
    assert similarity(read, target) == pytest.approx(expected, abs=1e-12)


def test_located_text_is_the_part_that_stands_out() -> None:
    picture = np.full((64, 64, 3), 200, dtype=np.uint8)
    picture[20:30, 10:50] = (10, 20, 30)
    assert locate(picture, margin=2).shape == (14, 44, 3)


def test_a_picture_without_contrast_is_located_whole() -> None:
    assert locate(np.full((40, 30, 3), 77, dtype=np.uint8)).shape == (40, 30, 3)


def test_the_contrast_image_is_dark_where_the_colour_differs_most_even_at_equal_grey() -> None:
    picture = np.full((9, 9, 3), (100, 100, 100), dtype=np.uint8)
    picture[4, 4] = (200, 49, 100)  # the same Rec. 601 luma to within one level
    grey = contrast_image(picture)
    assert grey[4, 4] == 0
    assert grey[0, 0] == 255


@pytest.mark.parametrize("text", ["HELLO", "ZEBRA", "QUICK"])
@pytest.mark.parametrize("reader", ["easyocr", "rapidocr"])
def test_both_readers_read_text_drawn_by_another_program(reader: str, text: str, request: pytest.FixtureRequest) -> None:
    scorer: OCR = request.getfixturevalue(reader)
    assert scorer.score([Image.fromarray(sign(text))], [f'"{text}"'])[0] == 1.0


def test_yellow_on_light_blue_is_read(easyocr: OCR) -> None:
    assert easyocr.score(word("MILK", color="yellow")[None], ['"MILK"'])[0] >= 0.75


def test_the_right_word_scores_above_a_wrong_one(easyocr: OCR) -> None:
    pictures = np.stack([word("LAMP"), word("LAMP")])
    right, wrong = easyocr.score(pictures, ['"LAMP"', '"ZOO"'])
    assert right == 1.0
    assert wrong < 0.5


def spoiled(count: int) -> list[np.ndarray]:
    """Words at the edge of what can be read, where a small change of the reader's answer shows."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        drawn = sample_lettering(rng, sample_text(rng)).draw()
        blurred = ndimage.gaussian_filter(drawn.astype(np.float64), (0.9, 0.9, 0)) + rng.normal(0, 14, drawn.shape)
        pictures.append(np.clip(blurred, 0, 255).astype(np.uint8))
    return pictures


def test_batch_and_single_agree_for_both_readers(easyocr: OCR, rapidocr: OCR) -> None:
    pictures = spoiled(24)
    for scorer in (easyocr, rapidocr):
        assert scorer.read(pictures) == [scorer.read([p])[0] for p in pictures]


def test_a_reading_depends_neither_on_its_neighbours_nor_on_what_was_read_before(easyocr: OCR) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    first, *pictures = spoiled(12)
    reading = easyocr.read([first, *pictures])[0]
    easyocr.read([noise] * 20)
    easyocr.read([sign("HELLO")])
    assert easyocr.read([first, noise])[0] == reading
    assert isinstance(easyocr.reader, EasyOCRReader)
    assert not easyocr.reader.reader.recognizer.training


def test_in_bfloat16_most_readings_are_the_same_and_none_depends_on_its_batch(easyocr: OCR, easyocr_in_bfloat16: OCR) -> None:
    pictures = spoiled(24)
    read = easyocr_in_bfloat16.read(pictures)
    assert read == [easyocr_in_bfloat16.read([p])[0] for p in pictures]
    # These words are at the edge of what can be read; of sharp ones all are the same.
    assert sum(ours == theirs for ours, theirs in zip(read, easyocr.read(pictures), strict=True)) >= 20
    assert easyocr_in_bfloat16.score([sign("HELLO"), word("LAMP")], ['"HELLO"', '"LAMP"']).tolist() == [1.0, 1.0]


def test_threads_change_no_reading_and_stay_as_many_as_they_were(easyocr: OCR, rapidocr: OCR) -> None:
    # With a line that is wider than what RapidOCR pads others to.
    lines = [*map(locate, spoiled(36)), sign("WIDE WORDS HERE", canvas=(330, 44))]
    for scorer in (easyocr, rapidocr):
        alone = scorer.reader.read_lines(lines)
        assert similarity(alone[-1], "WIDE WORDS HERE") > 0.8
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert scorer.reader.read_lines(lines) == alone
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


def test_threads_change_no_page_and_each_has_an_engine_of_its_own(
    easyocr: OCR, rapidocr: OCR, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["LEMON", "HOUSE", "GREEN", "STONE"]
    pages = [sign(text, size=36, canvas=(230 + 20 * i, 160)) for i, text in enumerate(texts)]
    for scorer in (easyocr, rapidocr):
        monkeypatch.setattr(type(scorer.reader), "threads", 2)
        assert scorer.read(pages) == [scorer.read([page])[0] for page in pages]
        assert [similarity(read, text) for read, text in zip(scorer.read(pages), texts, strict=True)] == [1.0] * 4
    assert isinstance(rapidocr.reader, RapidOCRReader)
    assert len({id(engine) for engine in rapidocr.reader._idle}) == 2


def test_an_engine_that_another_thread_took_in_between_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class SeemsFull(list[object]):
        def __bool__(self) -> bool:
            return True

    reader = RapidOCRReader.__new__(RapidOCRReader)
    reader._idle = SeemsFull()
    monkeypatch.setattr(reader, "_engine", lambda: lambda *_, **__: SimpleNamespace(txts=["A", "B"]))
    assert reader.read_page(np.zeros((2, 2, 3), np.uint8)) == "A B"
    assert len(reader._idle) == 1


def test_so_many_pages_at_a_time_as_the_memory_is_for_share_the_cores() -> None:
    at_work, seen, cores = [0], [0], set()

    class Slow(RapidOCRReader):
        PAGES = 2
        threads = 4

        def __init__(self) -> None:
            pass

        def read_page(self, image: np.ndarray) -> str:
            at_work[0] += 1
            seen[0] = max(seen[0], at_work[0])
            cores.add(torch.get_num_threads())
            sleep(0.05)
            at_work[0] -= 1
            return str(image[0, 0, 0])

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert Slow().read_pages([np.full((2, 2, 3), i, np.uint8) for i in range(6)]) == list("012345")
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [2]
    assert cores == {2}
    assert Slow().read_pages([]) == []


def test_letters_alone_are_letters_alone_on_pages_too(easyocr: OCR, easyocr_of_all: OCR) -> None:
    picture = sign("B2 4U", size=36, canvas=(230, 160))
    assert easyocr_of_all.score([picture], ['"B2 4U"'])[0] == 1.0
    (read,) = easyocr.read([picture])
    assert read
    assert read.replace(" ", "").isalpha()


@pytest.mark.parametrize("value", [0, 255, 128])
def test_flat_pictures_score_zero(easyocr: OCR, value: int) -> None:
    assert easyocr.score(np.full((1, 64, 64, 3), value, dtype=np.uint8), ['"LAMP"'])[0] == 0.0


def test_grey_transparent_and_tiny_pictures_are_taken(easyocr: OCR) -> None:
    rgba = Image.fromarray(word("LAMP")).convert("RGBA")
    pictures = [rgba, rgba.convert("L"), Image.new("RGB", (1, 1)), Image.new("LA", (8, 3))]
    scores = easyocr.score(pictures, ['"LAMP"'] * 4)
    assert scores[0] == scores[1] == 1.0
    assert np.isfinite(scores).all()


def test_no_pictures_give_no_scores(easyocr: OCR) -> None:
    assert easyocr.score([], []).shape == (0,)


def test_large_pictures_go_through_the_detector(rapidocr: OCR) -> None:
    page = np.full((256, 320, 3), 255, dtype=np.uint8)
    page[90:170, 60:290] = sign("LEMON", size=36, canvas=(230, 80))
    assert rapidocr.score(page[None], ['"LEMON"'])[0] == 1.0
    # In every order: RapidOCR keeps a call's arguments for the next one.
    pictures = [Image.fromarray(p) for p in (word("BEAR"), page, word("BEAR"), page)]
    assert rapidocr.read(pictures) == ["BEAR", "LEMON", "BEAR", "LEMON"]


def test_exact_match_is_reported_beside_similarity(easyocr: OCR) -> None:
    measured = easyocr.measure(np.stack([word("LAMP"), word("LAMP")]), ['"LAMP"', '"LAMB"'])
    assert list(measured) == ["ocr", "ocr_exact"]
    assert measured["ocr"].tolist() == [1.0, 0.75]
    assert measured["ocr_exact"].tolist() == [1.0, 0.0]


def test_what_was_read_with_is_described(easyocr: OCR) -> None:
    described = easyocr.describe()
    assert described["reader"] == "easyocr"
    assert described["device"] == "cpu"
    assert described["quantised"] is False
    assert "precision" not in described


@pytest.mark.parametrize(("has_instructions", "precision"), [(True, "bf16"), (False, None)])
def test_the_precision_auto_is_that_for_which_there_are_instructions(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool, precision: str | None
) -> None:
    monkeypatch.setattr("alignbench.runtime.hardware.has_fast_bfloat16", lambda device: has_instructions)
    assert load_scorer("ocr", precision="auto").describe().get("precision") == precision


def test_prompts_without_quotes_can_be_skipped(rapidocr: OCR) -> None:
    scorer = load_scorer("ocr", reader="rapidocr", unquoted="skip")
    pictures = np.full((3, 64, 64, 3), 200, dtype=np.uint8)
    scores = scorer.score(pictures, ["a red circle", 'the word "CAT"', 'the word ""'])
    assert np.isnan(scores).tolist() == [True, False, True]
    with pytest.raises(UserError, match="'a red circle' has none"):
        rapidocr.score(pictures[:1], ["a red circle"])


def test_a_text_that_the_reader_has_no_characters_for_is_refused_or_skipped(
    easyocr: OCR, easyocr_of_all: OCR, rapidocr: OCR
) -> None:
    for prompt, unknown in (('"B2"', "'2'"), ('"CAF\u00c9"', "'\u00e9'"), ('"\u6771 A"', "'\u6771'")):
        with pytest.raises(UserError, match=f"characters=letters cannot read {unknown} in the text"):
            easyocr.check_prompts(['"LAMP"', prompt])
    easyocr_of_all.check_prompts(['"~`!@#$%^&*()_+-={}[]|\\:;\'<>,.?/ 0 Az"', '"DON\u2019T \uff21"'])
    with pytest.raises(UserError, match="easyocr cannot read '\u00e9'"):
        easyocr_of_all.check_prompts(['"CAF\u00c9"'])
    rapidocr.check_prompts(['"CAF\u00c9 13\u00bd \u6771\u4eac"'])
    with pytest.raises(UserError, match="rapidocr cannot read '\ud55c'"):
        rapidocr.check_prompts(['"A \ud55c"'])
    skipping = load_scorer("ocr", reader="rapidocr", unquoted="skip")
    skipping.check_prompts(['"A \ud55c"', "nothing", 'one "quote'])
    assert np.isnan(skipping.score(word("LAMP")[None], ['"A \ud55c"'])).all()


def test_the_score_of_tmpo_is_a_setting(rapidocr: OCR) -> None:
    scorer = load_scorer("ocr", reader="rapidocr", score="tmpo")
    pictures, prompts = np.stack([word("LAMP")] * 4), ['"LAMP"', '"lamp"', '"LAM"', '"Lamp"']
    measured = scorer.measure(pictures, prompts)
    assert measured["ocr"].tolist() == [1.0, 0.0, 0.75, 0.25]
    assert measured["ocr_exact"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert rapidocr.score(pictures, prompts).tolist() == [1.0] * 4
    assert scorer.describe()["settings"]["score"] == "tmpo"


def test_words_beyond_ascii_are_targets_too() -> None:
    assert target_text("ein Schild mit “GRÜN”") == "GRÜN"
    assert similarity("grün", "GRÜN") == 1.0


@pytest.mark.parametrize("shape", [(2, 6000), (6000, 2), (1, 2560), (3, 20000)])
def test_a_page_of_any_shape_is_read(rapidocr: OCR, shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    page = widened(picture)
    assert max(page.shape) <= MAX_ASPECT_RATIO * min(page.shape[:2])
    assert len(rapidocr.reader.read_pages([picture])) == 1


def test_a_widened_page_shows_the_picture_on_its_own_ground() -> None:
    picture = np.full((2, 192, 3), 9, np.uint8)
    assert widened(np.full((4, 192, 3), 9, np.uint8)).shape == (4, 192, 3)
    picture[0, 96] = 200
    page = widened(picture)
    assert page.shape == (4, 192, 3)
    assert page[1:3].tolist() == picture.tolist()
    assert {*page[[0, 3]].ravel().tolist()} == {9}
