"""The page of faults says what is true: every fault that it names has its tests, and every marked test is on it."""

from catalogue import PAGE, marked, rows

SECTIONS = {"A": 23, "B": 15, "C": 12, "D": 16, "E": 14, "F": 9, "G": 10, "H": 9, "I": 12}  # faults in each section


def test_every_fault_has_a_test_or_a_reason_and_the_page_names_them():
    tests, found = marked(), list(rows())
    names = [row.fault for row in found]
    assert len(set(names)) == len(names)
    assert {fault for section, count in SECTIONS.items() for fault in _ids(section, count)} <= set(names)
    assert set(tests) <= set(names), f"marked faults that {PAGE.name} does not list"
    for row in found:
        if row.applies:
            assert tests.get(row.fault), f"{row.fault} has no test, and the page gives no reason"
            wanted = "; ".join(tests[row.fault])
            assert row.held == wanted, f"{row.fault}: fill the page in with `python -m tests.faults.catalogue`"
        else:
            assert row.fault not in tests
            assert len(row.held) > 40, f"{row.fault}: say why it does not apply"


def _ids(section: str, count: int) -> list[str]:
    return [f"{section}{number}" for number in range(1, count + 1)]
