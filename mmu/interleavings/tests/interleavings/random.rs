//! Random numbers that the scheduler's seed determines, so that a schedule can be replayed.

use shuttle::rand::Rng;

pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        Self(shuttle::rand::thread_rng().r#gen())
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        let next = self.0.wrapping_mul(6364136223846793005);
        self.0 = next.wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}
