"""torch's optimizers in float64, and how far from them a step in another dtype may be."""

import math

import torch
from cases import assert_within, compute_dtype, tiny, unit


class Bounded:
    """A number in float64, and how far the same calculation can be from it when each operation is rounded.

    Running error analysis (N. Higham, Accuracy and Stability of Numerical Algorithms, 3.3): every operation passes on
    the errors of its operands and adds the rounding of its result, by the unit roundoff of `dtype`.
    """

    def __init__(self, value, error, dtype):
        self.value, self.error, self.dtype = value, error, dtype

    def rounded(self, dtype):
        """Once more, to `dtype`."""
        error = self.error + unit(dtype) * (self.value.abs() + self.error) + tiny(dtype)
        return Bounded(self.value, error, self.dtype)

    def _other(self, x):
        return x if isinstance(x, Bounded) else Bounded(torch.tensor(x).double(), abs(x) * unit(self.dtype), self.dtype)

    def _result(self, value, error):
        return Bounded(value, error, self.dtype).rounded(self.dtype)

    def __add__(self, x):
        x = self._other(x)
        return self._result(self.value + x.value, self.error + x.error)

    def __sub__(self, x):
        x = self._other(x)
        return self._result(self.value - x.value, self.error + x.error)

    def __mul__(self, x):
        x = self._other(x)
        error = self.value.abs() * x.error + x.value.abs() * self.error + self.error * x.error
        return self._result(self.value * x.value, error)

    def __truediv__(self, x):
        x = self._other(x)
        quotient = self.value / x.value
        least = (x.value.abs() - x.error).clamp(min=1e-300)
        return self._result(quotient, (self.error + quotient.abs() * x.error) / least)

    def sqrt(self):
        root = self.value.sqrt()
        return self._result(root, root - (self.value - self.error).clamp(min=0).sqrt())

    def maximum(self, x):
        return Bounded(torch.maximum(self.value, x.value), torch.maximum(self.error, x.error), self.dtype)


def _bias(beta, steps, dtype):
    """1 - beta^t, where exp(t log(beta)) may stand for the power: logarithm, product and exponential are rounded."""
    power = beta**steps
    error = 4 * unit(torch.float64) * power * (1 + abs(steps * math.log(beta or 1.0)))
    return Bounded(torch.tensor(1 - power).double(), error, dtype)


def step_errors(group, dtype, steps, values, errors, gradient_error=0.0):
    """How far the parameter and the states of one tensor can be from torch's step in float64, after it.

    The formulas of torch.optim in :class:`Bounded` numbers, each result rounded to `dtype` at the end: AdamW, Adam
    without decay, SGD, and plain Adagrad and RMSprop.

    Args:
        group: torch's param_group.
        dtype: of the arrays.
        steps: how many the tensor will then have taken.
        values: parameter, gradient and states before the step, in float64.
        errors: of parameter and states before the step.
        gradient_error: relative. Four roundings come on top, for the coefficient and the product with it (in torch's
            kernels, the division by its inverse).
    """
    compute = compute_dtype(dtype)
    p, gradient, *states = values
    p, *states = (Bounded(value, error, compute) for value, error in zip((p, *states), errors))
    g = Bounded(gradient, gradient.abs() * (gradient_error + 4 * unit(compute)), compute)
    if group["maximize"]:
        g = g * -1.0
    lr = float(group["lr"])
    if "betas" in group:
        beta1, beta2 = group["betas"]
        states[0] = states[0] + (g - states[0]) * (1 - beta1)
        states[1] = states[1] * beta2 + g * g * (1 - beta2)
        if group["amsgrad"]:
            states[2] = states[2].maximum(states[1])
        root = states[-1].sqrt() / _bias(beta2, steps, compute).sqrt() + group["eps"]
        p = p * (1 - lr * group["weight_decay"]) - states[0] * lr / _bias(beta1, steps, compute) / root
    elif "alpha" in group:  # RMSprop
        states[0] = states[0] * group["alpha"] + g * g * (1 - group["alpha"])
        p = p - g * lr / (states[0].sqrt() + group["eps"])
    elif "lr_decay" in group:  # Adagrad
        states[0] = states[0] + g * g
        p = p - g * lr / (states[0].sqrt() + group["eps"])
    else:
        g = g + p * group["weight_decay"]
        if states:
            rest = 1.0 if steps == 1 else 1 - group["dampening"]
            states[0] = states[0] * group["momentum"] + g * rest
            g = g + states[0] * group["momentum"] if group["nesterov"] else states[0]
        p = p - g * lr
    return [x.rounded(dtype).error for x in (p, *states)]


class ExactSteps:
    """An optimizer of torch in float64, beside the same in other dtypes.

    Args:
        make: parameters in float64 -> torch's optimizer.
        parameters: of the other; their values are copied.
    """

    NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")

    def __init__(self, make, parameters):
        self.params = [torch.nn.Parameter(p.detach().double().clone()) for p in parameters]
        self.optimizer = make(self.params)
        self._tracked = {q: [p.dtype, 0, [torch.zeros_like(q)]] for p, q in zip(parameters, self.params)}

    def give(self, parameters):
        """Take over the gradients of `parameters`."""
        for q, p in zip(self.params, parameters):
            q.grad = None if p.grad is None else p.grad.detach().double().clone()

    def step(self, gradient_error=0.0):
        """One step. Where the gradients are clipped by now, the other's differ by a relative error."""
        before = {q: [q.detach().clone(), *map(torch.clone, self._states(q))] for q in self.params}
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for q in group["params"]:
                if q.grad is None:
                    continue
                dtype, steps, errors = self._tracked[q]
                zeros = [torch.zeros_like(q) for _ in self._states(q)]  # what states begin with
                p, *states = (before[q] + zeros)[: 1 + len(zeros)]
                errors = (errors + zeros)[: 1 + len(zeros)]
                errors = step_errors(group, dtype, steps + 1, [p, q.grad, *states], errors, gradient_error)
                self._tracked[q] = [dtype, steps + 1, errors]

    def _states(self, q):
        state = self.optimizer.state.get(q, {})
        return [state[name] for name in self.NAMES if state.get(name) is not None]

    def check(self, parameters):
        """Each of `parameters` is where it should be, within its error."""
        for p, q in zip(parameters, self.params):
            assert_within(p, q, self._tracked[q][2][0])
