"""The reader of C++ that the other structure tests lean on, tried on what fools such readers."""

import textwrap

import pytest

from tests.structure.cpp import functions, includes


def lengths(text: str) -> dict[str, int]:
    return {f.head.split("(")[0].split()[-1]: f.body_lines for f in functions(textwrap.dedent(text))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("namespace a::b { int f() { return 1; } }", {"f": 1}),
        (
            "struct S final : T {\n    S() : a_{1}, b_(2) {\n        x();\n        y();\n    }\n"
            "    int a_{3};\n};",
            {"S": 2},
        ),
        ("template <class T>\nauto f(T t) -> std::vector<T> {\n    return {t,\n            t};\n}", {"f": 2}),
        ("constexpr int table[] = {\n1,\n2,\n3,\n};\nvoid f() noexcept(true) {}", {"f": 1}),
        ('enum class E : int {\nA,\nB,\n};\nextern "C" {\nvoid g() {\n}\n}', {"g": 1}),
        ("void f() {\n  auto l = [] {\n    return '{';\n  };  // }\n  s = \"}\";\n}", {"f": 4}),
        (
            "void f() {\n  auto s = R\"x(}}\n}\n)x\";\n}\nint g() const { return 1'000'000; }",
            {"f": 3, "g": 1},
        ),
        ("#define X(a) { a\nint f() {\n return 1;\n}", {"f": 1}),
        ('__attribute__((target("avx2"))) int f() {\n\n  return 1;\n\n}', {"f": 1}),
        ("int g();\nint k = [](int x) {\n  return x;\n}(3);\nint f() { return 1; }", {"k = []": 1, "f": 1}),
        ('TEST_CASE("a {brace") {\n  CHECK(1);\n  CHECK(2);\n}', {"TEST_CASE": 2}),
    ],
)
def test_function_lengths(text: str, expected: dict[str, int]) -> None:
    found = lengths(text)
    assert {name: n for name, n in found.items() if name in expected} == {
        n: v for n, v in expected.items() if n in found
    }
    assert len(found) == len(expected)


def test_includes_are_found_and_comments_are_not() -> None:
    text = (
        '#include "memory/plan.hpp"\n// #include <thread>\n/* #include "x" */\n#  include <poll.h>  // why\n'
    )
    assert includes(text) == [('"', "memory/plan.hpp"), ("<", "poll.h")]
