"""A reward that a worker can import without Megatron."""


def vowels(prompt, response, answer):
    """Fraction of vowels, plus what the data says."""
    if answer == "broken":
        raise ValueError("no")
    return sum(letter in "aeiou" for letter in response) / max(1, len(response)) + answer
