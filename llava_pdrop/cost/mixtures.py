"""What is known of the released training data: samples, pictures, turns and tokens of every set in a mixture.

Sources of the numbers below:

- Samples per component of `LLAVA_15`: as its author counted them in the released file (github.com/haotian-liu/LLaVA,
  issue 702; the paper's Table 7 was corrected by it). The 158K LLaVA samples are 58K conversations, 23K descriptions
  and 77K of reasoning by the file names of liuhaotian/LLaVA-Instruct-150K.
- `OPEN_LLAVA_NEXT` adds what Open-LLaVA-NeXT's docs/Data.md names: 200K of ALLaVA-Instruct-VFLAN-4V and six sets whose
  sizes are those of InternVL's fine-tuning files (AI2D 12K, ChartQA 18K, DocVQA 10K, GeoQA+ 72K, SynthDoG-EN 30K). For
  DVQA we take the 10K that lead to the documented total of 1M: our estimate.
- Turns follow from questions per picture of the original sets (VQAv2: 444K questions on 83K pictures, GQA balanced:
  943K on 72K) and from the paper's limit of 10 for RefCOCO and Visual Genome; where a set has no such count they are
  our estimate.
- Tokens per question and answer, and sizes with their weights, are our estimates: COCO and Visual Genome pictures
  mostly have a longer side of 640 and 500 to 1024 pixels, OpenImages 1024, book covers about 330x500, scanned pages
  about 1700x2200, SynthDoG, charts and diagrams as their authors render them.
"""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]

COCO = (((640, 480), 0.45), ((640, 427), 0.25), ((480, 640), 0.2), ((427, 640), 0.1))
VISUAL_GENOME = (((500, 375), 0.35), ((640, 480), 0.25), ((1024, 768), 0.2), ((800, 600), 0.1), ((375, 500), 0.1))
OPEN_IMAGES = (((1024, 768), 0.45), ((1024, 683), 0.3), ((768, 1024), 0.25))
BOOKS = (((330, 500), 0.6), ((375, 500), 0.3), ((500, 500), 0.1))
PAGES = (((1700, 2200), 0.8), ((2200, 1700), 0.2))
RENDERED = (((850, 600), 0.5), ((600, 850), 0.25), ((1000, 700), 0.25))
FIGURES = (((448, 448), 0.4), ((600, 450), 0.4), ((250, 180), 0.2))


@dataclass(frozen=True)
class Component:
    """One data set of a mixture.

    Attributes:
        thousands: samples, in thousands.
        pictures: ((width, height), weight) of its pictures; empty: text only.
        turns: least and most questions of a sample, all counts between being equally likely.
        question, answer: mean text tokens of each.
    """

    name: str
    thousands: float
    pictures: tuple[tuple[Size, float], ...]
    turns: tuple[int, int]
    question: float
    answer: float


LLAVA_15 = (
    Component("LLaVA conversation", 58, COCO, (3, 6), 15, 40),
    Component("LLaVA description", 23, COCO, (1, 1), 15, 130),
    Component("LLaVA reasoning", 77, COCO, (1, 1), 20, 130),
    Component("ShareGPT", 40.7, (), (2, 8), 60, 250),
    Component("VQAv2", 82.8, COCO, (3, 8), 10, 2),
    Component("GQA", 72.1, VISUAL_GENOME, (8, 18), 12, 2),
    Component("OKVQA", 9, COCO, (1, 1), 22, 2),
    Component("OCRVQA", 80, BOOKS, (4, 6), 12, 8),
    Component("A-OKVQA", 66.2, COCO, (1, 1), 60, 1),
    Component("TextCaps", 22, OPEN_IMAGES, (1, 1), 60, 15),
    Component("RefCOCO", 48.4, COCO, (4, 10), 25, 18),
    Component("Visual Genome", 86.4, VISUAL_GENOME, (8, 10), 28, 22),
)
"""The 665K samples that LLaVA-1.5 is tuned on."""

OPEN_LLAVA_NEXT = (
    *LLAVA_15,
    Component("ALLaVA-VFLAN", 200, (*COCO, *OPEN_IMAGES), (1, 2), 30, 180),
    Component("AI2D", 12, FIGURES, (1, 1), 50, 1),
    Component("ChartQA", 18, RENDERED, (1, 1), 25, 3),
    Component("DocVQA", 10, PAGES, (2, 6), 15, 6),
    Component("DVQA", 10, FIGURES, (1, 1), 25, 2),
    Component("GeoQA+", 72, FIGURES, (1, 1), 80, 60),
    Component("SynthDoG-EN", 30, RENDERED, (1, 1), 10, 250),
)
"""The 1M samples that Open-LLaVA-NeXT is tuned on."""
