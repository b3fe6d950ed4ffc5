"""Candidates evaluated in other processes: ask for them, have them simulated, tell the values."""

from concurrent.futures import ProcessPoolExecutor

import numpy as np

from zo_adapt import AskTell, MeZO

TARGET = np.array([20.0, 0.0])


def distance(throws: np.ndarray) -> float:
    """Simulate a ball thrown at some speed and angle against the wind; how far from the target."""
    speed, angle = throws * [10.0, 1.0]
    position, velocity = np.zeros(2), speed * np.array([np.cos(angle), np.sin(angle)])
    for _ in range(2000):
        velocity = velocity + 0.002 * (np.array([-2.0, -9.81]) - 0.05 * np.abs(velocity) * velocity)
        position = position + 0.002 * velocity
        if position[1] < 0:
            break
    return float(np.linalg.norm(position - TARGET))


def main() -> None:
    """Eight candidates a step, on two workers."""
    start = np.array([0.8, 0.4])  # 8 m/s, 0.4 rad
    asker = AskTell(MeZO(displacement=1.0), start, max_queries=800)
    with ProcessPoolExecutor(2) as workers:
        while candidates := asker.ask():
            asker.tell(list(workers.map(distance, candidates)))
    print(f"distance before: {distance(start):.2f} m")
    speed, angle = asker.x * [10.0, 1.0]
    print(f"distance after: {distance(asker.x):.2f} m at {speed:.1f} m/s, {angle:.2f} rad")
    print(f"{asker.queries} simulations; {asker.stop_reason}")


if __name__ == "__main__":
    main()
