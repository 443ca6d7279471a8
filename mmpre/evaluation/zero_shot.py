"""Classification without labels: which class's text lies nearest, in the space that towers share?"""
# C classes, P prompts of each, D width

import numpy as np

from mmpre.data.sample import Sample
from mmpre.evaluation.cards import CardTask
from mmpre.evaluation.features import towered
from mmpre.evaluation.results import NotMeasured, Result, mean
from mmpre.evaluation.subject import TEST_ROWS, Subject, known_of, title


def zero_shot(task: CardTask, subject: Subject) -> list[Result]:
    """The class whose prompts lie nearest to a sample. Nothing is fitted and nothing chosen.

    A class's vector is the mean of its prompts' (Radford et al. 2021, arXiv:2103.00020, section 3.1.4). Raises
    NotMeasured where no tower reads the samples or none reads text.
    """
    text = subject.tower("txt")
    if missing := [member for member in (task.input, "txt") if not subject.tower(member)]:
        have = ", ".join(
            f"{role} (.{'|'.join(one.net.readers[role].suffixes)})" for role, one in subject.recipe.towers.items()
        )
        raise NotMeasured(
            f"zero-shot: wanted towers for .{task.input} and .txt, got none for .{' and .'.join(missing)} (the run has "
            f"{have or 'no towers'}); measure a run of a contrastive recipe, or probe this one"
        )
    vectors = subject.in_common(task, task.split, TEST_ROWS, task.input)
    known = known_of(task, task.split, TEST_ROWS, vectors.number_S, vectors.x_LSD)
    labels = sorted(set(known.y_S.tolist()))
    names = [task.name_of(one).replace("-", " ") for one in labels]
    prompts = [prompt.replace("{}", name) for name in names for prompt in task.prompts]
    samples = [Sample(str(i), "", "", {"txt": prompt.encode()}) for i, prompt in enumerate(prompts)]
    role, tower = text
    class_CPD = towered(tower, role, "txt", enumerate(samples)).x_LSD[0].reshape(len(labels), len(task.prompts), -1)
    class_CD = class_CPD.mean(1) / np.linalg.norm(class_CPD.mean(1), axis=1, keepdims=True).clip(1e-9)
    right = np.array(labels)[(known.layers[0] @ class_CD.T).argmax(1)] == known.y_S
    told = {"classes": len(labels), "prompts": list(task.prompts)}
    return [mean(f"{title(task)}: zero-shot", right, chance=1 / len(labels), protocol=told)]
