"""What pages.yaml, a task of lmms-eval, calls: as short as a user's own would be."""

from PIL import Image


def doc_to_visual(doc):
    """The picture of a question, as its file has it; none where it names none."""
    return [Image.open(doc["image"])] if doc["image"] else []


def process_results(doc, results):
    """1 where the answer is the expected one."""
    return {"exact": float(results[0].strip().lower() == doc["answer"].lower())}
