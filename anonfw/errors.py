"""Errors that a user can act on. The command line prints them as one line, without a traceback (exit code 2)."""


class AnonfwError(Exception):
    """Base of the project's expected errors. The message says what is wrong, where, and what to do about it."""

    exit_code = 2  # of the command line


class RecipeError(AnonfwError):
    """A recipe cannot be used. `mistakes` holds every one that was found, in the order of the recipe."""

    def __init__(self, mistakes: list) -> None:
        self.mistakes = list(mistakes)
        count = len(self.mistakes)
        title = f"{count} mistake{'s' if count != 1 else ''} in the recipe"
        super().__init__("\n".join([title, *(f"  {mistake}" for mistake in self.mistakes)]))
