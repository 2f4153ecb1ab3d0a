"""Static sizes of a step, and operators that shorten what is encoded."""
