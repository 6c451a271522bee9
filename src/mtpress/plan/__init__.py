"""The recipe, and the plan that follows from it and from the tensor headers: which tensor becomes which, before a weight is read."""
