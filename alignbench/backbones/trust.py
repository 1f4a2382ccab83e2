"""What a model's folder may hold: weights and settings, but nothing that runs."""

from pathlib import Path

from alignbench.errors import UserError


def refuse_code(folder: Path) -> None:
    """Refuses a folder with Python files where diffusers looks for a component's code: older versions run them unasked.

    Raises:
        UserError: naming the first of them.
    """
    found = sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
    if found:
        raise UserError(f"{folder} holds code ({found[0].relative_to(folder)}); alignbench runs none from a model's folder")
