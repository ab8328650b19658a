//! A line that is typed at a terminal that shows nothing by itself.

use alloc::string::String;
use alloc::vec::Vec;

/// The longest line in bytes; what is typed beyond is ignored.
const LONGEST: usize = 256;

const CONTROL_C: u8 = 3;
const CONTROL_D: u8 = 4;
const BACKSPACE: u8 = 8;
const CONTROL_U: u8 = 21;
const DELETE: u8 = 127;
/// Takes back one character on the terminal.
const ERASE: &[u8] = b"\x08 \x08";

/// The line so far.
#[derive(Clone, Debug, Default)]
pub struct LineEditor {
    line: Vec<u8>,
}

/// What comes of a byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// The terminal shall show this.
    Echo(Vec<u8>),
    /// The line is complete.
    Line(String),
    /// The user leaves.
    Close,
}

impl LineEditor {
    /// Takes a byte.
    pub fn take(&mut self, byte: u8) -> Typed {
        match byte {
            b'\r' | b'\n' => Typed::Line(self.finish()),
            CONTROL_D if self.line.is_empty() => Typed::Close,
            BACKSPACE | DELETE if self.line.pop().is_some() => Typed::Echo(ERASE.into()),
            CONTROL_C | CONTROL_U => {
                let echo = ERASE.repeat(self.line.len());
                self.line.clear();
                Typed::Echo(echo)
            }
            b' '..=b'~' if self.line.len() < LONGEST => {
                self.line.push(byte);
                Typed::Echo([byte].into())
            }
            _ => Typed::Echo(Vec::new()),
        }
    }

    /// The line, which begins anew.
    fn finish(&mut self) -> String {
        let line = core::mem::take(&mut self.line);
        line.into_iter().map(char::from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(typed: &[u8]) -> Vec<String> {
        let mut editor = LineEditor::default();
        let typed = typed.iter().map(|&byte| editor.take(byte));
        typed
            .filter_map(|typed| match typed {
                Typed::Line(line) => Some(line),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn lines_end_at_enter_and_can_be_corrected() {
        assert_eq!(lines(b"list\rhelp\n"), ["list", "help"]);
        assert_eq!(lines(b"lisx\x7ft\r"), ["list"]);
        assert_eq!(lines(b"\x08\x08a\x08b\r"), ["b"]);
        assert_eq!(lines(b"nonsense\x15list\r"), ["list"]);
        assert_eq!(lines(b"\xffl\x1bi\0st\r"), ["list"]);
        assert_eq!(lines(&[b'a'; 300]), Vec::<String>::new());
        let long = lines(&[[b'a'; 300].as_slice(), b"\r"].concat());
        assert_eq!(long[0].len(), LONGEST);
    }

    #[test]
    fn the_terminal_shows_what_the_line_holds() {
        let mut editor = LineEditor::default();
        assert_eq!(editor.take(b'a'), Typed::Echo(b"a".to_vec()));
        assert_eq!(editor.take(CONTROL_D), Typed::Echo(Vec::new()));
        assert_eq!(editor.take(CONTROL_U), Typed::Echo(ERASE.to_vec()));
        assert_eq!(editor.take(DELETE), Typed::Echo(Vec::new()));
        assert_eq!(editor.take(CONTROL_D), Typed::Close);
    }
}
