//! The keys after Ctrl-A.

/// What Ctrl-A h prints.
pub const HELP: &str = "\
Ctrl-A h    this help
Ctrl-A c    the monitor, and back to the guest
Ctrl-A s    what the guests do now
Ctrl-A x    end all guests
Ctrl-A a    send Ctrl-A to the guest
";

const CONTROL_A: u8 = 1;

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// It is typed to whatever has the keyboard.
    Typed(u8),
    /// Print [`HELP`].
    Help,
    /// Open or close the monitor.
    Monitor,
    /// Print what the guests do.
    Status,
    /// End all guests.
    Quit,
}

/// Finds the keys after Ctrl-A in what is typed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Escape {
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    /// Ctrl-A was the last key.
    Open,
}

impl Escape {
    /// What `byte` means; `None` for Ctrl-A itself and for a key that means nothing after it.
    pub const fn key(&mut self, byte: u8) -> Option<Key> {
        match (self.state, byte) {
            (State::Closed, CONTROL_A) => {
                self.state = State::Open;
                return None;
            }
            (State::Closed, byte) => return Some(Key::Typed(byte)),
            (State::Open, _) => self.state = State::Closed,
        }
        match byte {
            b'h' | b'?' => Some(Key::Help),
            b'c' => Some(Key::Monitor),
            b's' => Some(Key::Status),
            b'x' => Some(Key::Quit),
            b'a' | CONTROL_A => Some(Key::Typed(CONTROL_A)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn keys_after_control_a_are_commands() {
        let mut escape = Escape::default();
        let mut keys = |typed: &[u8]| {
            let keys = typed.iter().filter_map(|&byte| escape.key(byte));
            keys.collect::<Vec<_>>()
        };
        assert_eq!(keys(b"x"), [Key::Typed(b'x')]);
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01\x01\x01a"), [Key::Typed(1), Key::Typed(1)]);
        assert_eq!(keys(b"\x01qc"), [Key::Typed(b'c')], "q means nothing");
        assert_eq!(keys(b"\x01"), []);
        assert_eq!(keys(b"hc"), [Key::Help, Key::Typed(b'c')]);
        for line in HELP.lines() {
            let key = line.as_bytes()[7];
            assert_eq!(keys(&[1, key]).len(), 1, "{line}");
        }
    }
}
