"""The mixture of Student's t and a normal distribution: its density, and samples that follow it."""

import torch
from torch.distributions import Normal, StudentT

from moeyard.moe.models.mixture import mixture_of


def raw(*shape, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 6, generator=generator, dtype=torch.float64) * spread


def theirs(mixture, x):
    student = StudentT(mixture.freedom, mixture.loc_t, mixture.scale_t)
    normal = Normal(mixture.loc_normal, mixture.scale_normal)
    parts = [
        mixture.log_share_t + student.log_prob(x),
        mixture.log_share_normal + normal.log_prob(x),
    ]
    return torch.stack(parts).logsumexp(dim=0)


def test_the_density_is_that_of_torch_with_its_gradient():
    ours, other = (raw(40, 8).requires_grad_() for _ in range(2))
    x = torch.linspace(-30, 30, 8, dtype=torch.float64).expand(40, 8)
    found, wanted = mixture_of(ours).log_density(x), theirs(mixture_of(other), x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-8, atol=1e-8)


def test_shares_add_up_to_one_and_the_density_integrates_to_one():
    mixture = mixture_of(raw(5, 1, spread=1.0))
    shares = mixture.log_share_t.exp() + mixture.log_share_normal.exp()
    torch.testing.assert_close(shares, torch.ones_like(shares))
    x = torch.linspace(-400, 400, 200_001, dtype=torch.float64)
    total = torch.trapezoid(mixture.log_density(x).exp(), x, dim=1)
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-3)


def test_half_precision_is_computed_in_fp32():
    assert mixture_of(raw(3).to(torch.bfloat16)).log_density(torch.zeros(3)).dtype == torch.float32


def test_points_far_away_have_finite_gradients():
    numbers = raw(1).float().requires_grad_()
    mixture_of(numbers).log_density(torch.tensor([1e6])).sum().backward()
    assert numbers.grad.isfinite().all()


def test_samples_follow_the_density():
    mixture = mixture_of(raw(6, seed=3, spread=1.0))
    uniforms = torch.rand(3, 100_000, 6, generator=torch.Generator().manual_seed(0))
    samples_SN = mixture.samples(uniforms.double().clamp(min=1e-12))
    x_X1 = torch.linspace(-100, 100, 100_001, dtype=torch.float64).unsqueeze(1)
    below_XN = (mixture.log_density(x_X1).exp() * (x_X1[1] - x_X1[0])).cumsum(dim=0)
    for place in range(48_000, 53_000, 500):
        share_N = (samples_SN <= x_X1[place]).double().mean(dim=0)
        torch.testing.assert_close(share_N, below_XN[place], rtol=0, atol=0.006)


def test_each_part_alone_is_its_distribution():
    """With all of the share, a part's samples are exact functions of its uniform numbers."""
    u = torch.tensor([[0.5], [0.3], [0.0]], dtype=torch.float64)
    numbers = torch.tensor([[-40.0, 0, 0, 0, 1.5, 0.7]], dtype=torch.float64)
    normal = mixture_of(numbers)
    radius = (-2 * u[1].log()).sqrt()
    torch.testing.assert_close(normal.samples(u), 1.5 + normal.scale_normal * radius)
    numbers[0, 0] = 40
    student = mixture_of(numbers)
    freedom = student.freedom
    radius = (freedom * (u[1] ** (-2 / freedom) - 1)).sqrt()
    torch.testing.assert_close(student.samples(u), student.scale_t * radius)
